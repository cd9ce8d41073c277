"""Asks the relay for the node's metrics text."""

import asyncio

import zmq

from shared import sockets
from shared.config import NodeConfig
from shared.frames import MetricsText, Scrape
from shared.sockets import Decoder, LoopSocket, encode

SCRAPE_SECONDS = 1.0
"""A scrape ends within this, whatever else hangs."""


class Metrics:
    """One DEALER to the relay."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", config: NodeConfig) -> None:
        self._decoder: Decoder[MetricsText] = Decoder(MetricsText, "the metrics socket")
        self._socket = LoopSocket(sockets.dealer(context, config.path, sockets.METRICS), self._receive)
        self._asked: dict[int, asyncio.Future[str]] = {}
        self._number = 0

    async def text(self) -> str:
        """The metrics. Raises TimeoutError when the relay does not answer."""
        self._number += 1
        number = self._number
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        try:
            self._socket.send([encode(Scrape(number))])
            return await asyncio.wait_for(future, SCRAPE_SECONDS)
        except zmq.Again as error:
            raise TimeoutError("the relay is not there") from error
        finally:
            self._asked.pop(number, None)

    def close(self) -> None:
        self._socket.close()

    def _receive(self, parts: list[bytes]) -> None:
        frame = self._decoder.decode(parts[0])
        future = self._asked.get(frame.id) if frame is not None else None
        if frame is not None and future is not None and not future.done():
            future.set_result(frame.text)
