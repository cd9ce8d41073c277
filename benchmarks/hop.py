"""What the hop between SGLang and Dynamo costs: CPU per token of its engine side and its agent side, one token a step and stream.

usage: python -m benchmarks.hop [--streams 256] [--step 0.004] [--seconds 5] [--rounds 3]
Engine side: ``Sink.step`` to the socket. Agent side: socket to ``ResponseSender.send``, which does nothing here; ``pull``: to the
generator that Dynamo would ask chunk by chunk. Dynamo's own part (encoding, its threads, TCP) is in benchmarks.token_path.
"""

import argparse
import asyncio
import gc
import multiprocessing
import tempfile
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import uvloop
import zmq

from procs.agent.handler import Handler
from procs.engine.service import Service
from shared import sockets
from shared.engine_client import EngineClient
from shared.frames import Beat, EngineFacts
from shared.heart import Heart
from shared.roles import ROLES

FACTS = EngineFacts("aggregated", "hop", "0", "/m", "m", 512, 2**31, 16, 1, 1, 1, 0, 1, 1, [2], 0.0)
BEAT = Beat("engine", 1, "ready", "", 0.0, "", 1, 0)
REQUEST = {"token_ids": [5, 6], "stop_conditions": {"max_tokens": 2**31}}


class Steps:
    """A backend that gives every request one token a step."""

    facts = FACTS
    info: dict[str, str] = {}  # noqa: RUF012 - nothing changes it

    def __init__(self) -> None:
        self.rids: list[str] = []

    def submit(self, rid: str, payload: dict[str, Any]) -> None:
        self.rids.append(rid)

    def abort(self, rid: str) -> None: ...

    def numbers(self) -> dict[str, float]:
        return {}


def engine_side(directory: Path, step: float, pipe: Connection) -> None:
    """Steps for ever; CPU seconds and tokens so far for each word on the pipe."""

    async def run() -> None:
        backend: Any = Steps()
        heart = Heart(directory, "engine", incarnation=1)
        service = Service(backend, sockets.router(zmq.Context(), directory, sockets.REQUESTS), heart, incarnation=1, epoch=0)
        service.start()
        pipe.send("up")
        asyncio.get_running_loop().add_reader(pipe.fileno(), lambda: answer(pipe, int(service.numbers()["tokens"])))
        while True:
            began = time.monotonic()
            service.step([(rid, [7]) for rid in backend.rids])
            await asyncio.sleep(max(0.0, step - (time.monotonic() - began)))

    quiet(run)


def agent_side(directory: Path, streams: int, push: bool, pipe: Connection) -> None:
    """Takes what comes for ever; CPU seconds and chunks so far for each word on the pipe."""
    chunks = 0

    def send(_chunk: Any, /) -> None:
        nonlocal chunks
        chunks += 1

    async def drain(generator: AsyncIterator[Any]) -> None:
        async for chunk in generator:
            send(chunk)

    async def run() -> None:
        client = EngineClient(directory, "agent:0")
        while client.welcome is None:
            client.hear_beat(BEAT)
            await asyncio.sleep(0.01)
        handler = Handler(client, ROLES["aggregated"], lambda: "")
        loop = asyncio.get_running_loop()
        context = SimpleNamespace(
            id=lambda: "", trace_headers=dict, notify_first_token=lambda: None, async_killed_or_stopped=loop.create_future
        )
        sender: Any = SimpleNamespace(send=send, close=lambda: None) if push else None
        running = [loop.create_task(drain(handler.generate(REQUEST, context, response_sender=sender))) for _ in range(streams)]
        pipe.send("up")
        loop.add_reader(pipe.fileno(), lambda: answer(pipe, chunks))
        while not any(task.done() for task in running):
            client.hear_beat(BEAT)
            await asyncio.sleep(0.5)

    quiet(run)


def quiet(run: Any) -> None:
    gc.freeze()
    uvloop.run(run())


def answer(pipe: Connection, count: int) -> None:
    pipe.recv()
    pipe.send((time.process_time(), count))


def measure(streams: int, step: float, seconds: float, *, push: bool) -> tuple[float, float, float, float]:
    """CPU microseconds per token of engine side and agent side, tokens a chunk, tokens/s."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "sock").mkdir()
        pipes, processes = [], []
        sides: tuple[tuple[Any, ...], ...] = ((engine_side, directory, step), (agent_side, directory, streams, push))
        for target, *arguments in sides:
            here, there = spawn.Pipe()
            processes.append(spawn.Process(target=target, args=(*arguments, there), daemon=True))
            processes[-1].start()
            there.close()
            pipes.append(here)
            here.recv()

        def look() -> list[tuple[float, int]]:
            for pipe in pipes:
                pipe.send("look")
            return [pipe.recv() for pipe in pipes]

        time.sleep(1)
        before, began = look(), time.monotonic()
        time.sleep(seconds)
        after, took = look(), time.monotonic() - began
        for process in processes:
            process.kill()
            process.join()
    (engine, tokens), (agent, chunks) = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, after, strict=True)]
    return engine / tokens * 1e6, agent / tokens * 1e6, tokens / chunks, tokens / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--step", type=float, default=0.004, help="seconds")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{'':>5} {'engine us/token':>22} {'agent us/token':>22} {'tokens/chunk':>13} {'tokens/s':>9} {'per agent core':>15}")
    rows: dict[str, list[tuple[float, float, float, float]]] = {"push": [], "pull": []}
    for _ in range(options.rounds):
        for way, results in rows.items():
            results.append(measure(options.streams, options.step, options.seconds, push=way == "push"))
    for way, results in rows.items():
        engine, agent, merged, rate = (sorted(column) for column in zip(*results, strict=True))
        cells = [f"{median(c):.2f} [{c[0]:.2f}, {c[-1]:.2f}]".rjust(22) for c in (engine, agent)]
        print(f"{way:>5} {' '.join(cells)} {median(merged):13.2f} {median(rate):9.0f} {1e6 / median(agent):15.0f}")


if __name__ == "__main__":
    main()
