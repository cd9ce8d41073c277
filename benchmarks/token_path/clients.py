"""The client processes: started once, they send their parts of each load from one agreed time on."""

import asyncio
import gc
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from benchmarks.token_path.drive import Done, serve
from benchmarks.token_path.load import Load

HEAD_START = 0.05
"""Seconds from the word to start until all processes do."""
KEEP_ALIVE = 600.0


class LoadError(Exception):
    """A load that counts for nothing: a request that failed, or tokens that were missing."""


class Clients:
    """Up to ``count`` processes for one frontend."""

    def __init__(self, count: int, url: str, model: str) -> None:
        self._all: list[tuple[Any, Connection]] = []
        context = multiprocessing.get_context("spawn")
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_client, args=(theirs, url, model), daemon=True)
            process.start()
            theirs.close()
            self._all.append((process, ours))

    def run(self, load: Load, started: Callable[[], None]) -> list[Done]:
        """Send a load; ``started`` is called just before. Raises LoadError."""
        used = self._all if load.rate else self._all[: load.streams]
        return run([connection for _, connection in used], load, started)

    def close(self) -> None:
        for _, connection in self._all:
            connection.close()
        for process, _ in self._all:
            process.join(1.0)
            process.kill()


def run(connections: list[Connection], load: Load, started: Callable[[], None]) -> list[Done]:
    """Have the processes behind the connections (drive.serve) send a load together. Raises LoadError."""
    try:
        for index, connection in enumerate(connections):
            connection.send((load, index, len(connections)))
        for connection in connections:
            if connection.recv() != "ready":
                raise LoadError("a load process is out of step")
        started()
        start = time.monotonic() + HEAD_START
        for connection in connections:
            connection.send(start)
        answers, waiting = [], list(connections)
        while waiting:
            ready = wait(waiting)
            answers += [connection.recv() for connection in waiting if connection in ready]
            waiting = [connection for connection in waiting if connection not in ready]
    except (EOFError, ConnectionError) as error:
        raise LoadError(f"a load process has died ({error or type(error).__name__})") from error
    for answer in answers:
        if not isinstance(answer, Done):
            raise LoadError(answer)
    return answers


def _client(connection: Connection, url: str, model: str) -> None:
    import aiohttp
    import uvloop

    from benchmarks.token_path.stream import Http

    async def session() -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE)
        return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=KEEP_ALIVE))

    gc.freeze()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        opened = runner.run(session())
        serve(connection, runner, Http(opened, url, model))
        runner.run(opened.close())
