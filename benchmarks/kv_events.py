"""KV events through the relay on one core, beside a bare subscriber: ``python -m benchmarks.kv_events [--memory]``.

The consumer has core 0 for itself; frames come from a played SGLang on core 1, where a Dynamo KV router listens, too. The bare
subscriber takes the same frames from the same socket and decodes them with msgspec, nothing more. The relay also mirrors,
and publishes for one worker; it is done when the router knows the last block.
"""

import argparse
import asyncio
import atexit
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import psutil
import zmq

from procs.relay.kv.wire import AllBlocksCleared, BlockRemoved, BlockStored
from shared import sockets
from shared.frames import AnyState, Beat
from tests.frontend import LOOPBACK
from tests.harness import wait_for
from tests.kv_follower import Follower
from tests.kv_player import Player
from tests.kv_router import KvRouter

PAGE = 16
STORES = 4
"""In a frame: as many requests are taken in one scheduler step; each evicts as much as it brings."""
CACHE_CHAINS = 400
SHAPES = {"one block an event": (1, 20_000), "32 blocks an event": (32, 4_000)}
"""Blocks that a store brings, and frames of one measurement."""
ON_CORE = ("taskset", "--cpu-list", "0")
BURST_SECONDS = 1.0


class Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    dp_rank: int | None = None


def frames(count: int, blocks: int, *, evicting: bool = True) -> tuple[list[bytes], list[int]]:
    """Encoded frames as SGLang's, and the prompt that the last one stores."""
    chance, encode = random.Random(1), msgspec.msgpack.Encoder().encode
    live: list[list[int]] = []
    found, tokens = [], []
    for _ in range(count):
        events: list[dict[str, Any]] = []
        for _ in range(STORES):
            hashes = [chance.getrandbits(63) for _ in range(blocks)]
            tokens = [chance.randrange(128_000) for _ in range(blocks * PAGE)]
            stored = {"block_hashes": hashes, "parent_block_hash": None, "token_ids": tokens, "block_size": PAGE, "lora_id": None}
            events.append({"type": "BlockStored", **stored, "medium": "GPU"})
            live.append(hashes)
        if evicting and len(live) > CACHE_CHAINS:
            gone = [each for hashes in live[:STORES] for each in hashes]
            del live[:STORES]
            events.append({"type": "BlockRemoved", "block_hashes": gone, "medium": "GPU"})
        found.append(encode([time.time(), events, 0]))
    return found, tokens


def events_in(payloads: list[bytes]) -> int:
    return sum(len(msgspec.msgpack.decode(each, type=Batch).events) for each in payloads)


def bare(address: str, count: int) -> None:
    """Take and decode so many frames; a line when listening, and one at the end."""
    sock: zmq.Socket[bytes] = zmq.Context().socket(zmq.SUB)
    sock.setsockopt(zmq.RCVHWM, 0)
    sock.setsockopt(zmq.SUBSCRIBE, b"")
    sock.connect(address)
    decode = msgspec.msgpack.Decoder(Batch).decode
    print("listening", flush=True)
    last = -1
    while last < count - 1:
        _, number, payload = sock.recv_multipart()
        last = int.from_bytes(number, "big")
        decode(payload)
    print(last, flush=True)


class Bare:
    """The bare subscriber."""

    def __init__(self, player: Player, count: int) -> None:
        command = [*ON_CORE, sys.executable, "-m", "benchmarks.kv_events", "--bare", player.events, str(count)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._process.stdout.readline()
        time.sleep(0.5)  # until the subscription is there

    def wait(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline(), "the bare subscriber has ended"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Relay:
    """The relay, its workers' identities and a router that hears it. ``agents``: workers that it publishes for."""

    def __init__(self, player: Player, model: Path, agents: int = 1) -> None:
        self._directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True, prefix="sgn-", dir="/tmp")
        root = Path(self._directory.name)
        (store := root / "store").mkdir()
        environ = {**os.environ, **LOOPBACK, "DYN_FILE_KV": str(store), "HOME": str(root), "DYN_LOG": "error"}
        command = [sys.executable, "-m", "tests.dp_worker", str(model), "demo", str(PAGE)]
        self._leaders = [subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) for _ in range(agents)]
        for leader in self._leaders:
            atexit.register(leader.kill)
        self.workers = {int(each.stdout.readline()) for each in self._leaders if each.stdout is not None}
        self._loop = asyncio.new_event_loop()  # of the beats
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.follower = self._run(self._follow(root / "f", store))
        atexit.register(self.follower.relay.kill)
        self._beats = sockets.subscriber(zmq.Context(), root / "f", ["relay"])
        self._decoder = msgspec.msgpack.Decoder(AnyState)
        self.router = KvRouter(store, PAGE)
        self.router.overlaps([1] * PAGE)
        self._run(self._say(player))

    def _run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(30)

    async def _follow(self, directory: Path, store: Path) -> Follower:
        follower = Follower(directory, store, PAGE, ON_CORE)
        for heart in follower.hearts:
            heart.start()
        return follower

    async def _say(self, player: Player) -> None:
        self.follower.say(player, self.workers)

    async def _close(self) -> None:
        self.follower.close()

    def numbers(self) -> dict[str, float]:
        """Of its next beat."""
        while True:
            beat = self._decoder.decode(self._beats.recv())
            if isinstance(beat, Beat):
                return {name.removesuffix("_dp1"): value for name, value in beat.numbers.items()}

    def wait_publishing(self) -> None:
        wait_for("publishers", lambda: self.numbers().get("kv_publishers") == len(self.workers), 30)

    def wait_known(self, tokens: list[int], seconds: float = 300) -> None:
        wanted = {(worker, 1): len(tokens) // PAGE for worker in self.workers}
        wait_for("the router knows the last block", lambda: self.router.overlaps(tokens) == wanted, seconds, every=0.005)

    @property
    def rss_mb(self) -> float:
        return float(psutil.Process(self.follower.relay.pid).memory_info().rss / 1e6)

    def close(self) -> None:
        self.router.close()
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        for leader in self._leaders:
            leader.kill()
            leader.wait()
        self._directory.cleanup()


def send(player: Player, payloads: list[bytes], per_second: float = 0) -> None:
    """All at once, or paced."""
    began = time.perf_counter()
    for number, payload in enumerate(payloads):
        if per_second and number % 10 == 0:
            while (ahead := number / per_second - (time.perf_counter() - began)) > 0:
                time.sleep(min(ahead, 0.001))
        player.send(payload)


def timed(act: Callable[[], None], until: Callable[[], None]) -> tuple[float, float]:
    """Seconds that ``act`` took, and from its beginning until ``until`` returned."""
    began = time.perf_counter()
    act()
    sent = time.perf_counter() - began
    until()
    return sent, time.perf_counter() - began


def measure(model: Path, name: str, rounds: int) -> dict[str, Any]:
    """Rates of both, in turns, and then what is left over when ten times the relay's rate is offered for a second."""
    blocks, count = SHAPES[name]
    payloads, last = frames(count, blocks)
    events = events_in(payloads)
    rates: dict[str, list[float]] = {"bare": [], "relay": []}
    for _ in range(rounds):
        with Player() as player:
            subscriber = Bare(player, count)
            _, seconds = timed(lambda: send(player, payloads), subscriber.wait)
            subscriber.close()
            rates["bare"].append(events / seconds)
        with Player() as player:
            relay = Relay(player, model)
            relay.wait_publishing()
            _, seconds = timed(lambda: send(player, payloads), lambda: relay.wait_known(last))  # noqa: B023
            relay.close()
            rates["relay"].append(events / seconds)
    relay_rate = median(rates["relay"])
    result: dict[str, Any] = {
        "shape": name,
        "events": events,
        "blocks_per_event": blocks,
        **{f"{who}_events_per_s": [round(each) for each in sorted(found)] for who, found in rates.items()},
        "relay_stored_blocks_per_s": round(relay_rate / events * count * STORES * blocks),
        "relay_to_bare": round(relay_rate / median(rates["bare"]), 3),
    }
    offered = relay_rate * 10 * count / events
    wanted = int(offered * BURST_SECONDS)
    payloads, last = frames(wanted, blocks)
    events = events_in(payloads)
    with Player() as player:
        subscriber = Bare(player, wanted)
        sent, seconds = timed(lambda: send(player, payloads, offered), subscriber.wait)
        subscriber.close()
        result["at_10x"] = {"bare": {"offered_events_per_s": round(events / sent), "lag_s": round(seconds - sent, 2)}}
    with Player() as player:
        relay = Relay(player, model)
        relay.wait_publishing()
        sent, seconds = timed(lambda: send(player, payloads, offered), lambda: relay.wait_known(last))
        numbers = relay.numbers()
        result["at_10x"]["relay"] = {
            "offered_events_per_s": round(events / sent), "lag_s": round(seconds - sent, 2), "rss_mb": round(relay.rss_mb),
            **{key: numbers[f"kv_event_{key}"] for key in ("gaps", "frames_replayed", "frames_lost")},
        }  # fmt: skip
        relay.close()
    return result


def memory(model: Path, agents: int, millions: float) -> dict[str, Any]:
    """What the relay's memory grows by when so many blocks are stored and none is evicted."""
    payloads, last = frames(int(millions * 1e6 / STORES / 32), 32, evicting=False)
    with Player() as player:
        relay = Relay(player, model, agents)
        relay.wait_publishing()
        before = relay.rss_mb
        for start in range(0, len(payloads), 1000):  # not faster than it is taken: frames that wait are not the mirror's
            send(player, part := payloads[start : start + 1000])
            end = start + len(part)
            wait_for("it is taken", lambda: relay.numbers().get("kv_event_frames", 0) >= end, 300)  # noqa: B023
        relay.wait_known(last)
        grown, numbers = relay.rss_mb - before, relay.numbers()
        relay.close()
    taken = numbers["kv_blocks"] / 1e6
    return {"agents": agents, "blocks": int(numbers["kv_blocks"]), "mb_per_million_blocks": round(grown / taken)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/demo-llama"), help="of the workers' model cards")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=float, default=0, metavar="MILLIONS", help="also: memory with so many blocks")
    parser.add_argument("--agents", type=int, nargs="+", default=[1, 2, 4], help="for --memory")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--bare", nargs=2, metavar=("ADDRESS", "FRAMES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        bare(arguments.bare[0], int(arguments.bare[1]))
        return
    os.sched_setaffinity(0, {1})
    results = [measure(arguments.model, name, arguments.rounds) for name in SHAPES] if arguments.rounds else []
    grown = [memory(arguments.model, agents, arguments.memory) for agents in arguments.agents] if arguments.memory else []
    document = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.kv_events", *sys.argv[1:]]),
        "host": {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("ai-dynamo", "sglang", "pyzmq", "msgspec")},
        "results": results,
        "memory": grown,
    }
    text = json.dumps(document, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
