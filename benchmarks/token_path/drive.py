"""The loops that send a load, in whichever process: closed and open; and the process that does so when told to."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from benchmarks.token_path.load import Load, Request, prompt

ARRIVALS_SEED = 7
LEAST = 2
"""Requests of a stream that are sent however long they take: steady is between the end of the first and of the last."""


class Source(Protocol):
    """Where requests go."""

    def use(self, way: str) -> None:
        """Send them another way from now on, where there are several."""

    def prepare(self, ids: list[int], output: int) -> Any:
        """What can be done for a request before the load begins."""

    async def run(self, prepared: Any, request: Request) -> None:
        """Send it and fill in ``request``. Raises when it does not end with tokens, all of them."""


@dataclass
class Done:
    """What one process did of a load."""

    requests: list[Request]
    cpu: float
    """CPU seconds of the process."""
    wall: float


def arrivals(load: Load) -> list[float]:
    """Seconds from the beginning at which an open loop sends: the same ones for every side."""
    drawn, at, times = random.Random(ARRIVALS_SEED), 0.0, []
    while (at := at + drawn.expovariate(load.rate)) < load.at_most:
        times.append(at)
    return times


class Part:
    """One process's share of a load: number ``index`` of ``count``."""

    def __init__(self, load: Load, index: int, count: int, source: Source) -> None:
        self._load, self._source = load, source
        self.done: list[Request] = []
        if load.rate:
            times = arrivals(load)
            self._jobs = {n: [self._job(n)] for n in range(index, len(times), count)}
            self._at = {n: times[n] for n in self._jobs}
        else:
            mine = range(index, load.streams, count)
            self._jobs = {n: [self._job(n * load.requests + k) for k in range(load.requests)] for n in mine}
            self._at = dict.fromkeys(self._jobs, 0.0)

    def _job(self, number: int) -> Any:
        load = self._load
        return self._source.prepare(prompt(load.seed + number, load.input, load.vocab), load.output)

    async def run(self, start: float) -> None:
        """Raises what the first request that failed raised; the others are cancelled then."""
        try:
            async with asyncio.TaskGroup() as group:
                for stream, jobs in self._jobs.items():
                    group.create_task(self._stream(stream, jobs, start))
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None

    async def _stream(self, stream: int, jobs: Sequence[Any], start: float) -> None:
        await asyncio.sleep(max(0.0, start + self._at[stream] - time.monotonic()))
        for number, job in enumerate(jobs):
            if number >= LEAST and time.monotonic() > start + self._load.at_most:
                return
            request = Request(stream, time.monotonic())
            await self._source.run(job, request)
            if request.tokens != self._load.output:
                raise RuntimeError(f"{request.tokens} tokens instead of {self._load.output}")
            self.done.append(request)


def serve(connection: Connection, runner: asyncio.Runner, source: Source) -> None:
    """Send loads as told, until the other side of the connection closes.

    It says ``(load, index, count)``, gets "ready", says when to start, and gets a Done or the text of an error. A text
    instead of a load goes to ``source.use``.
    """
    while True:
        try:
            told = connection.recv()
        except EOFError:
            return
        if isinstance(told, str):
            source.use(told)
            continue
        load, index, count = told
        part = Part(load, index, count, source)
        connection.send("ready")
        start: float = connection.recv()
        cpu = time.process_time()
        try:
            runner.run(part.run(start))
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")
            continue
        connection.send(Done(part.done, time.process_time() - cpu, time.monotonic() - start))
