"""What 1 MB and 16 MB cost on their way between agent and engine, by the ways there are, and what they do to other streams' gaps.

usage: python -m benchmarks.payload [--sizes 1,16] [--rounds 5] [--times 24] [--record FILE]
``EngineClient`` and ``Service`` in two processes over the real socket; the engine answers a payload at once. Ways: ``parts``
behind the frame (what a node does); ``msgpack``, inside it; ``memfd``, shared memory, new for each, its bytes copied out;
``kept``, the same memory again; ``in place``, kept memory read where it is; ``call``, in one process, without a hop. Then gaps of
streams with a token a step in the same two processes, without and with a payload each ``--every`` seconds.
"""

import argparse
import asyncio
import json
import mmap
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import zmq

from benchmarks.figures import quantile
from benchmarks.hop import BEAT, FACTS, quiet
from benchmarks.token_path import host
from procs.engine.service import Service
from shared import sockets
from shared.blobs import BLOBS
from shared.engine_client import EngineClient
from shared.frames import Output
from shared.heart import Heart

WAYS = ("call", "parts", "msgpack", "memfd", "kept", "in place")
DIRECTIONS = ("request", "answer")
BESIDE = ("parts", "msgpack", "kept")
"""Ways that are looked at beside streams."""
AT_ONCE = 3
"""Payloads on their way when throughput is measured. Four answers of 16 MB inside one frame are past the socket's limit."""
LOST_SECONDS = 20.0
PAGE = 4096
STOP = {"type": "stop"}
Carried = dict[str, Any]
Numbers = dict[str, float]


class Way:
    """Puts bytes into a payload or an answer's metadata, and takes them out at the other end."""

    def __init__(self) -> None:
        self._memory: list[tuple[int, int, int]] = [(-1, 0, 0)] * AT_ONCE
        """Descriptors with their sizes and their numbers, in turns."""
        self._turn = self._made = 0
        self._seen: dict[int, mmap.mmap] = {}

    def pack(self, way: str, data: bytes) -> Carried:
        match way:
            case "call" | "parts":
                return {BLOBS: [data]}
            case "msgpack":
                return {"data": data}
        self._turn = (self._turn + 1) % AT_ONCE
        descriptor, size, number = self._memory[self._turn]
        if way == "memfd" or size != len(data):
            if descriptor >= 0:
                os.close(descriptor)
            self._made = number = self._made + 1
            descriptor = os.memfd_create("payload")
            self._memory[self._turn] = descriptor, len(data), number
        os.pwrite(descriptor, data, 0)
        return {"path": f"/proc/{os.getpid()}/fd/{descriptor}", "number": number, "size": len(data)}

    def unpack(self, way: str, carried: Carried) -> int:
        """How many bytes arrived, readable here."""
        match way:
            case "call" | "parts":
                return len(carried[BLOBS][0])
            case "msgpack":
                return len(carried["data"])
        mapped = self._seen.get(carried["number"]) if way == "in place" else None
        if mapped is None:
            with open(carried["path"], "rb", buffering=0) as file:
                if way != "in place":
                    return len(file.read(carried["size"]))
                mapped = self._seen[carried["number"]] = mmap.mmap(file.fileno(), carried["size"], prot=mmap.PROT_READ)
        with memoryview(mapped) as view:
            view[::PAGE].tobytes()
        return len(mapped)


class Echo:
    """A backend: a payload is taken and answered at once, in the direction that it says; a stream gets one token a step."""

    facts = FACTS
    info: dict[str, str] = {}  # noqa: RUF012 - nothing changes it

    def __init__(self, data: bytes) -> None:
        self._data, self._way = memoryview(data), Way()
        self._sizes: dict[int, bytes] = {}
        self.rids: list[str] = []
        self.answer: Callable[[str, Carried], None] = lambda _rid, _meta: None

    def submit(self, rid: str, payload: dict[str, Any]) -> None:
        if payload.get("stream"):
            self.rids.append(rid)
            return
        way, size, direction = payload["way"], payload["bytes"], payload["direction"]
        if direction == "request":
            assert self._way.unpack(way, payload) == size
            meta: Carried = {}
        else:
            if size not in self._sizes:
                self._sizes[size] = bytes(self._data[:size])
            meta = self._way.pack(way, self._sizes[size])
        self.answer(rid, {**meta, "cpu": time.process_time()})

    def abort(self, rid: str) -> None:
        if rid in self.rids:
            self.rids.remove(rid)

    def numbers(self) -> dict[str, float]:
        return {}


def engine_side(directory: Path, data: int, step: float, pipe: Connection) -> None:
    async def run() -> None:
        backend = Echo(os.urandom(data))
        served: Any = backend
        heart = Heart(directory, "engine", incarnation=1)
        service = Service(served, sockets.router(zmq.Context(), directory, sockets.REQUESTS), heart, incarnation=1, epoch=0)
        backend.answer = lambda rid, meta: service.output(rid, [7], STOP, meta)
        service.start()
        pipe.send("up")
        while True:
            began = time.monotonic()
            if backend.rids:
                service.step([(rid, [7]) for rid in backend.rids])
            await asyncio.sleep(max(0.0, step - (time.monotonic() - began)))

    quiet(run)


class Agent:
    """The other end: sends payloads and waits for their answers."""

    def __init__(self, client: EngineClient, data: dict[int, bytes]) -> None:
        self._client, self._data, self._way = client, data, Way()
        self._here = Echo(max(data.values(), key=len))
        self.engine_cpu = 0.0

    async def once(self, way: str, size: int, direction: str) -> float:
        """Seconds from the payload in hand to its answer, or from the question to the payload in hand."""
        began = time.perf_counter()
        payload: Carried = {"way": way, "bytes": size, "direction": direction}
        if direction == "request":
            payload |= self._way.pack(way, self._data[size])
        async with asyncio.timeout(LOST_SECONDS):
            meta = await (self._called(payload) if way == "call" else self._sent(payload))
        if direction == "answer":
            assert self._way.unpack(way, meta) == size
        took = time.perf_counter() - began
        self.engine_cpu = meta["cpu"]
        return took

    async def _sent(self, payload: Carried) -> Carried:
        last: Output | None = None
        async for output in self._client.submit(payload):
            last = output
        assert last is not None and last.meta is not None
        return last.meta

    async def _called(self, payload: Carried) -> Carried:
        done: asyncio.Future[Carried] = asyncio.get_running_loop().create_future()
        self._here.answer = lambda _rid, meta: done.set_result(meta)
        self._here.submit("", payload)
        return await done

    async def measure(self, way: str, size: int, direction: str, times: int) -> Numbers:
        """Latency one by one, CPU of both processes, and throughput of AT_ONCE at a time."""
        await self.once(way, size, direction)
        before, cpu = self.engine_cpu, time.process_time()
        seconds = [await self.once(way, size, direction) for _ in range(times)]
        ours, theirs = time.process_time() - cpu, self.engine_cpu - before
        found = {"p50_ms": quantile(seconds, 0.5) * 1e3, "p90_ms": quantile(seconds, 0.9) * 1e3}
        found |= {"agent_cpu_ms": ours / times * 1e3, "engine_cpu_ms": 0.0 if way == "call" else theirs / times * 1e3}

        async def some() -> None:
            for _ in range(times // AT_ONCE):
                await self.once(way, size, direction)

        began = time.perf_counter()
        await asyncio.gather(*[some() for _ in range(1 if way == "call" else AT_ONCE)])
        done = times // AT_ONCE * (1 if way == "call" else AT_ONCE)
        found["mb_per_s"] = size * done / (time.perf_counter() - began) / 1e6
        return found

    async def gaps(self, load: tuple[str, int, str] | None, streams: int, seconds: float, every: float) -> Numbers:
        """Between a stream's tokens, while ``load`` is sent each ``every`` seconds."""
        gaps: list[float] = []
        running = [self._client.submit({"stream": True}) for _ in range(streams)]

        async def read(stream: Any) -> None:
            last = 0.0
            async for _ in stream:
                now = time.perf_counter()
                if last and now > counted:
                    gaps.append(now - last)
                last = now

        async def send() -> None:
            while load is not None:
                await asyncio.sleep(every)
                await self.once(*load)

        counted = time.perf_counter() + 0.5
        tasks = [asyncio.ensure_future(read(stream)) for stream in running]
        sending = asyncio.ensure_future(send())
        await asyncio.sleep(0.5 + seconds)
        sending.cancel()
        for stream, task in zip(running, tasks, strict=True):
            task.cancel()
            stream.abort()
            self._client.forget(stream.rid)
        await asyncio.gather(sending, *tasks, return_exceptions=True)
        return {f"{name}_ms": quantile(gaps, q) * 1e3 for name, q in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999), ("max", 1.0))}


def agent_side(directory: Path, options: argparse.Namespace, pipe: Connection) -> None:
    async def beats(client: EngineClient) -> None:
        while True:
            client.hear_beat(BEAT)
            await asyncio.sleep(0.1)

    async def run() -> None:
        client = EngineClient(directory, "agent:0")
        beating = asyncio.ensure_future(beats(client))
        welcomed = asyncio.Event()
        client.on_change = welcomed.set
        await welcomed.wait()
        agent = Agent(client, {size << 20: os.urandom(size << 20) for size in options.sizes})
        for number in range(options.rounds):
            for size in options.sizes:
                for direction in DIRECTIONS:
                    for way in WAYS:
                        found = await agent.measure(way, size << 20, direction, options.times)
                        pipe.send(("ways", f"{size} MB {direction} {way}", found))
            for way in ("none", *BESIDE):
                for direction in DIRECTIONS[: 1 if way == "none" else 2]:
                    load = None if way == "none" else (way, max(options.sizes) << 20, direction)
                    found = await agent.gaps(load, options.streams, options.seconds, options.every)
                    pipe.send(("gaps", way if load is None else f"{direction} {way}", found))
            pipe.send(("round", number, {}))
        beating.cancel()

    quiet(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda text: [int(each) for each in text.split(",")], default=[1, 16], help="MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", type=int, default=24, help="payloads of a kind and round")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--step", type=float, default=0.01, help="seconds")
    parser.add_argument("--seconds", type=float, default=3.0, help="gaps are looked at, a kind and round")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between the payloads beside the streams")
    parser.add_argument("--record", type=Path, help="JSON file to write")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    results: dict[str, dict[str, dict[str, list[float]]]] = {"ways": {}, "gaps": {}}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "sock").mkdir()
        processes = []
        sides: tuple[tuple[Any, ...], ...] = (
            (engine_side, directory, max(options.sizes) << 20, options.step),
            (agent_side, directory, options),
        )
        pipes = []
        for target, *arguments in sides:
            here, there = spawn.Pipe()
            processes.append(spawn.Process(target=target, args=(*arguments, there), daemon=True))
            processes[-1].start()
            there.close()
            pipes.append(here)
            if target is engine_side:
                here.recv()
        rounds = 0
        while rounds < options.rounds:
            kind, label, found = pipes[-1].recv()
            rounds += kind == "round"
            for figure, value in found.items():
                results[kind].setdefault(label, {}).setdefault(figure, []).append(round(value, 4))
        for process in processes:
            process.kill()
            process.join()
    for rows in results.values():
        figures = list(next(iter(rows.values())))
        print(f"{'median of rounds [lowest, highest]':24}" + "".join(f"{figure:>26}" for figure in figures))
        for label, found in rows.items():
            cells = [f"{quantile(v, 0.5):.2f} [{min(v):.2f}, {max(v):.2f}]" for v in found.values()]
            print(f"{label:24}" + "".join(f"{cell:>26}" for cell in cells))
    if options.record:
        options.record.write_text(json.dumps({**host.header("benchmarks.payload"), **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
