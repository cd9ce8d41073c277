"""A process that offers embeddings over NIXL or fetches them, told what to do: tests.nixl_peer with the ends of one mode."""

import asyncio
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, cast

from tests import nixl_peer


class Peer(nixl_peer.Peer):
    """Context manager. ``mode``: nixl-write or nixl-read."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.embeddings_peer", mode],
            env={**os.environ, "NIXL_LOG_LEVEL": "FATAL", "UCX_LOG_LEVEL": "fatal"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )


class Process:
    """The other end. Each method is a command."""

    def __init__(self, rooms: Any, mode: str) -> None:
        self._rooms = rooms
        self._mode = mode
        self._box: Any = None
        self._offers: list[Any] = []
        self._fetching: asyncio.Future[Any]

    async def outbox(self) -> Any:
        self._box = self._rooms.outbox(self._mode)
        return True

    async def inbox(self) -> Any:
        self._box = self._rooms.inbox(self._mode)
        return True

    async def offer(self, rows: int, value: float) -> Any:
        """[Which it is, what a receiver needs to know]."""
        import torch

        self._offers.append(await self._box.offer(torch.full((rows, 512), value, dtype=torch.bfloat16)))
        return [len(self._offers) - 1, self._offers[-1][0]]

    async def fetched(self, which: int, seconds: float) -> Any:
        try:
            await asyncio.wait_for(asyncio.shield(self._offers[which][1]), seconds)
        except Exception as error:
            return type(error).__name__
        return True

    async def withdraw(self, which: int) -> Any:
        self._offers[which][2]()
        return True

    async def fetch(self, transfer: dict[str, Any], seconds: float) -> Any:
        """The values that came, or the name of what was raised."""
        try:
            async with asyncio.timeout(seconds):
                return (await self._box.fetch(transfer)).unique().tolist()
        except Exception as error:
            return str(getattr(error, "code", type(error).__name__))

    async def begin(self, transfer: dict[str, Any], seconds: float) -> Any:
        """A fetch that goes on when this is answered."""
        self._fetching = asyncio.ensure_future(self.fetch(transfer, seconds))
        return True

    async def end(self) -> Any:
        return await self._fetching

    async def block(self, seconds: float) -> Any:
        """Hold the loop that has NIXL for so long, from now on."""
        import time

        self._box._side.loop.call_soon_threadsafe(time.sleep, seconds)
        return True

    async def writing(self) -> Any:
        """Of nixl-write: [offers and registrations, transfers] of a sender, [bytes, late ranges] of a receiver."""
        end = self._box._end
        if hasattr(end, "arena"):
            return [end.arena.used, len(end.late)]
        return [len(end.transfer_tracker) + len(end.registered_descs), len(end._writing)]


if __name__ == "__main__":
    # Without the package's own imports: SGLang's take ten seconds.
    package = types.ModuleType(nixl_peer.ADAPTER)
    package.__path__ = [str(Path(__file__).parent.parent / nixl_peer.ADAPTER.replace(".", "/"))]
    sys.modules[nixl_peer.ADAPTER] = package
    from procs.engine.adapter import embeddings_nixl

    embeddings_nixl.SETTLE_SECONDS = 0.5
    asyncio.run(nixl_peer.main(cast(Any, Process(embeddings_nixl, sys.argv[1]))))
