"""The relay's loop: node state in, KV use, KV events and metrics out. It never touches a request."""

import asyncio
import signal
from typing import Any

import msgspec
import zmq

from procs.relay.kv.kv import KvEvents
from procs.relay.scrape import Scraper
from shared import sockets
from shared.config import NodeConfig
from shared.frames import AnyState, Beat, Death, KvUse, MetricsText, Scrape
from shared.heart import Heart
from shared.sockets import Decoder, LoopSocket, encode
from shared.state import Board, State


class Relay:
    """One node's relay."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._board = Board()
        self._use: dict[int, KvUse] = {}
        self._heart = Heart(config.path, "relay")
        self._scrapes: set[asyncio.Task[None]] = set()
        self._scraper = Scraper(config, self._board)

    async def run(self) -> None:
        """Until SIGTERM."""
        loop = asyncio.get_running_loop()
        end = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end.set)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._states: Decoder[AnyState] = Decoder(AnyState, "node state")
        self._asked: Decoder[Scrape] = Decoder(Scrape, "the metrics socket")
        self._kv = KvEvents(self._config, context, self._say)
        others = [name for name in self._config.processes if name != "relay"]
        states = LoopSocket(sockets.subscriber(context, self._config.path, others), self._hear)
        self._metrics = LoopSocket(sockets.router(context, self._config.path, sockets.METRICS), self._scrape_asked)
        self._heart.numbers = self._numbers
        self._heart.repeat = lambda: list(self._use.values())
        self._heart.start()
        self._say()
        try:
            await end.wait()
        finally:
            self._kv.close()
            self._heart.set(State.STOPPED)
            for task in self._scrapes:
                task.cancel()
            states.close()
            self._metrics.close()
            context.term()
            self._heart.close()

    def _numbers(self) -> dict[str, float]:
        return {"dropped_frames": self._states.dropped + self._asked.dropped, **self._kv.numbers()}

    def _say(self) -> None:
        self._heart.set(State.READY, self._kv.detail)

    def _hear(self, parts: list[bytes]) -> None:
        frame: Any = self._states.decode(parts[0])
        match frame:
            case Beat():
                self._board.hear(frame)
                self._kv.hear(frame)
            case Death():
                self._forget_use(frame.incarnation + 1)
                self._kv.dead(frame.incarnation)
            case KvUse():
                self._forget_use(frame.incarnation)
                self._use[frame.dp_rank] = frame
                self._heart.publish(frame)

    def _forget_use(self, before: int) -> None:
        """What an engine used is gone with it: drop what incarnations below ``before`` said."""
        self._use = {rank: use for rank, use in self._use.items() if use.incarnation >= before}

    def _scrape_asked(self, parts: list[bytes]) -> None:
        if len(parts) != 2:
            self._asked.drop(f"{len(parts)} parts instead of 2")
            return
        frame = self._asked.decode(parts[1])
        if frame is not None:
            task = asyncio.get_running_loop().create_task(self._scrape(parts[0], frame.id))
            self._scrapes.add(task)
            task.add_done_callback(self._scrapes.discard)

    async def _scrape(self, identity: bytes, number: int) -> None:
        self._board.hear(msgspec.structs.replace(self._heart.beat, numbers=self._numbers()))
        found = await self._scraper.text(self._use)
        try:
            self._metrics.send([identity, encode(MetricsText(number, found))])
        except zmq.ZMQError:
            return  # the prober that asked is gone
