"""How fast a group agrees on an epoch and what it costs its leader: ``python -m benchmarks.group_scale --sizes 4 16 64 256``.

The leader has this process for itself, all followers share another on the same machine: with many of them it is their process
that is waited for, and real nodes are faster.
"""

import argparse
import asyncio
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from statistics import median

from tests.group_rooms import Room, Watch
from tests.groups import dist_port

IDLE_SECONDS = 5.0
LIMIT_SECONDS = 120.0
DEADLINE = 10.0
"""Long: the followers' one process shall not lose contact because it is busy."""


def followers(nnodes: int, port: int, directory: Path) -> None:
    """Every rank but 0, until it is terminated."""

    async def run() -> None:
        rooms = [Room(rank, nnodes, port, directory, Watch(), DEADLINE) for rank in range(1, nnodes)]
        for room in rooms:
            room.start_node()
        await asyncio.Event().wait()

    asyncio.run(run())


async def agree(leader: Room, watch: Watch) -> float:
    """Seconds until the leader has heard that every engine is ready in the next epoch, from when its own had gone."""
    began, epoch = time.monotonic(), leader.epoch
    leader.kill_engine()
    while not (leader.epoch > epoch and leader.all_ready()):
        assert time.monotonic() - began < LIMIT_SECONDS, "no epoch"
        await asyncio.sleep(0.002)
    return time.monotonic() - watch.gone_at


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def measure(nnodes: int, port: int, directory: Path, rounds: int) -> dict[str, float]:
    watch = Watch()
    leader = Room(0, nnodes, port, directory, watch, DEADLINE)
    began = time.monotonic()
    leader.start_node()
    try:
        while not leader.all_ready():
            assert time.monotonic() - began < LIMIT_SECONDS, "no first epoch"
            await asyncio.sleep(0.02)
        before = cpu()
        await asyncio.sleep(IDLE_SECONDS)
        idle = (cpu() - before) / IDLE_SECONDS
        before = cpu()
        times = [await agree(leader, watch) for _ in range(rounds)]
        each = (cpu() - before) / rounds
    finally:
        leader.kill_node()
    return {
        "nnodes": nnodes,
        "agree_ms": round(median(times) * 1e3, 1),
        "agree_most_ms": round(max(times) * 1e3, 1),
        "leader_cpu_percent": round(idle * 100, 2),
        "leader_cpu_ms_per_epoch": round(each * 1e3, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    for nnodes in arguments.sizes:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
            port = dist_port()
            others = spawn.Process(target=followers, args=(nnodes, port, Path(directory)))
            others.start()
            try:
                print(json.dumps(asyncio.run(measure(nnodes, port, Path(directory), arguments.rounds))), flush=True)
            finally:
                others.kill()
                others.join()


if __name__ == "__main__":
    main()
