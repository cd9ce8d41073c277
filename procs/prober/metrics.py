"""Asks the relay for the node's metrics text."""

import asyncio

import zmq

from shared import sockets
from shared.config import NodeConfig
from shared.frames import MetricsText, Scrape
from shared.sockets import Decoder, LoopSocket, encode

SCRAPE_SECONDS = 0.9
"""A scrape ends within a second, whatever else hangs."""


class Metrics:
    """One DEALER to the relay. Scrapes that come while one is under way get the same answer."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", config: NodeConfig) -> None:
        self._decoder: Decoder[MetricsText] = Decoder(MetricsText, "the metrics socket")
        self._socket = LoopSocket(sockets.dealer(context, config.path, sockets.METRICS), self._receive)
        self._asked: asyncio.Task[str] | None = None
        self._answer: asyncio.Future[str] | None = None
        self._number = 0

    async def text(self) -> str:
        """The metrics. Raises TimeoutError when the relay does not answer."""
        if self._asked is None or self._asked.done():
            self._asked = asyncio.get_running_loop().create_task(self._ask())
            self._asked.add_done_callback(lambda task: task.cancelled() or task.exception())  # whoever asked may have left
        return await asyncio.shield(self._asked)

    async def _ask(self) -> str:
        self._number += 1
        self._answer = asyncio.get_running_loop().create_future()
        try:
            self._socket.send([encode(Scrape(self._number))])
            return await asyncio.wait_for(self._answer, SCRAPE_SECONDS)
        except zmq.Again as error:
            raise TimeoutError("the relay is not there") from error

    def close(self) -> None:
        if self._asked is not None:
            self._asked.cancel()
        self._socket.close()

    def _receive(self, parts: list[bytes]) -> None:
        frame = self._decoder.decode(parts[0])
        if frame is not None and frame.id == self._number and self._answer is not None and not self._answer.done():
            self._answer.set_result(frame.text)
