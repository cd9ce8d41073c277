"""The prefill engines that this worker's requests wait for: an open connection to each, whose end is its death.

SGLang 0.5.23 hears of a dead prefill by heartbeats, after 10 s and more, and keeps the requests until then. The kernel closes the
connections of a killed process at once.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

from shared.engine_client import Stream
from shared.errors import Code, RequestError

CONNECT_SECONDS = 2.0
"""An address that doesn't answer at all proves nothing: SGLang's own timeouts decide then."""
IDLE_SECONDS = 30.0
"""A connection that no request needs is closed after so long."""
Address = tuple[str, int]


class Peers:
    """Holds requests until their first token. ``on_death`` is for tests and metrics."""

    def __init__(self) -> None:
        self._waiting: dict[Address, set[Stream]] = {}
        self._of: dict[Stream, Address] = {}
        self._watching: dict[Address, asyncio.Task[None]] = {}
        self.deaths = 0
        self.on_death: Callable[[Address], None] = lambda address: None

    def hold(self, host: str, port: int, stream: Stream) -> None:
        """The request needs that prefill engine alive until ``release``."""
        address = (host.strip("[]"), port)
        self._waiting.setdefault(address, set()).add(stream)
        self._of[stream] = address
        if address not in self._watching:
            self._watching[address] = asyncio.get_running_loop().create_task(self._watch(address))

    def release(self, stream: Stream) -> None:
        """Its KV cache is here, or it has ended."""
        address = self._of.pop(stream, None)
        if address is not None:
            self._waiting[address].discard(stream)

    def close(self) -> None:
        for task in list(self._watching.values()):
            task.cancel()

    async def _watch(self, address: Address) -> None:
        """Until nobody has needed it for a while. Each end of a connection is checked by a new one: it may be mere idleness."""
        try:
            while True:
                try:
                    async with asyncio.timeout(CONNECT_SECONDS):
                        reader, writer = await asyncio.open_connection(*address)
                except TimeoutError:
                    logging.warning("prefill at %s:%d does not answer a connection", *address)
                    return
                except ValueError as error:  # a host that is no name at all
                    logging.warning("prefill at %s:%d: %s", *address, error)
                    return
                except OSError as error:
                    self._dead(address, error.strerror or str(error))
                    return
                with contextlib.closing(writer):
                    sock: socket.socket = writer.get_extra_info("socket")
                    # A host that has vanished is noticed too.
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3)):
                        sock.setsockopt(socket.IPPROTO_TCP, option, value)
                    if not await self._ended(address, reader):
                        return
        finally:
            self._watching.pop(address, None)
            if not self._waiting.get(address):
                self._waiting.pop(address, None)

    async def _ended(self, address: Address, reader: asyncio.StreamReader) -> bool:
        """True when the connection ends, False when nobody needs it any more."""
        while True:
            with contextlib.suppress(TimeoutError, OSError):
                async with asyncio.timeout(IDLE_SECONDS):
                    await reader.read(1)
                return True
            if reader.at_eof() or reader.exception() is not None:
                return True
            if not self._waiting.get(address):
                return False

    def _dead(self, address: Address, why: str) -> None:
        streams = self._waiting.pop(address, set())
        self.deaths += 1
        logging.warning("prefill at %s:%d is gone (%s): %d requests wait for its KV cache", *address, why, len(streams))
        for stream in streams:
            self._of.pop(stream, None)
            if not stream.ended:
                stream.abort()
                stream.fail(RequestError(Code.PEER_DEAD, f"the prefill worker at {address[0]}:{address[1]} is gone ({why})"))
        self.on_death(address)
