"""The prober's loop: hears the node, runs canaries, serves HTTP."""

import asyncio
import os
import signal
from typing import Any

import zmq

from procs.prober import http
from procs.prober.canary import Canary
from procs.prober.metrics import Metrics
from procs.prober.routes import Routes
from shared import sockets
from shared.config import NodeConfig
from shared.engine_client import EngineClient
from shared.errors import NodeError
from shared.frames import AnyState, Beat, Death, Frame, Intent
from shared.heart import Heart
from shared.roles import find
from shared.roles.role import CONTROL_ENDPOINTS
from shared.sockets import Decoder, LoopSocket
from shared.state import Board, State


def _loras_enabled() -> bool:
    """DYN_LORA_ENABLED as Dynamo reads it (dynamo.common.utils.env), whose import costs more than this process."""
    return os.environ.get("DYN_LORA_ENABLED", "").lower() in ("true", "1", "yes")


class Prober:
    """One node's prober. A follower has no canaries, only HTTP."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self.board = Board()
        self.want = "serve"

    async def run(self) -> None:
        """Until SIGTERM. Raises NodeError when the port can't be bound."""
        config = self._config
        loop = asyncio.get_running_loop()
        end = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end.set)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        metrics = Metrics(context, config)
        self._client = EngineClient(config.path, "prober")
        self._routes = routes = Routes(self._client, self._adapters, loras=_loras_enabled())
        try:
            server = await http.start(config, self, metrics, routes)
        except NodeError:
            metrics.close()
            self._client.close()
            context.term()
            raise
        self._heart = Heart(config.path, "prober")
        self._canary = Canary(config, find(config.role, text=config.text_mode), self._client, self._heart.say)
        self._heart.repeat = self._repeat
        self._decoder: Decoder[AnyState] = Decoder(AnyState, "node state")
        self._heart.numbers = lambda: {"dropped_frames": self._decoder.dropped + self._client.dropped}
        others = [name for name in config.processes if name != "prober"]
        states = LoopSocket(sockets.subscriber(context, config.path, others), self._hear)
        self._heart.start()
        self._heart.set(State.READY)
        tasks = [loop.create_task(self._canary.run())] if config.node_rank == 0 else []
        ending = loop.create_task(end.wait())
        await asyncio.wait([*tasks, ending], return_when=asyncio.FIRST_COMPLETED)
        self._heart.set(State.STOPPED)
        for task in (*tasks, ending):
            if task.done():
                task.result()  # a defect in the canary ends the process with its traceback
            task.cancel()
        await server.cleanup()
        states.close()
        metrics.close()
        self._client.close()
        context.term()
        self._heart.close()

    def _repeat(self) -> list[Frame]:
        return [] if self._canary.verdict is None else [self._canary.verdict]

    def _hear(self, parts: list[bytes]) -> None:
        frame: Any = self._decoder.decode(parts[0])
        match frame:
            case Beat():
                self.board.hear(frame)
                if frame.process.startswith("agent"):
                    self._routes.hear()
                if frame.process == "engine":
                    self._canary.hear_engine(frame)
                elif frame.process == "keeper":
                    self._canary.hear_stopped(frame.info.get("stopped", ""))
                if self._config.node_rank == 0:
                    self._client.hear_beat(frame)
            case Death():
                self._client.hear_death(frame)
            case Intent():
                self.want = frame.want

    @property
    def healthy(self) -> bool:
        """The engine is up, a canary has come through, and an agent has it in discovery."""
        engine, verdict = self.board.beat("engine"), self._canary.verdict
        if engine is None or engine.state != State.READY:
            return False
        if self._config.node_rank > 0:
            return True
        return (
            verdict is not None
            and verdict.healthy
            and verdict.incarnation == engine.incarnation
            and any(self._registered(name) for name in self._config.agent_names)
        )

    @property
    def judged(self) -> bool:
        """An engine was up and canaries have said how it is."""
        return self._canary.verdict is not None

    @property
    def endpoints(self) -> list[str]:
        """What an agent has in discovery, by Dynamo's names."""
        role = find(self._config.role, text=self._config.text_mode)
        return [self._config.dynamo.endpoint, *(CONTROL_ENDPOINTS if role.generates else ())]

    def _adapters(self) -> set[str]:
        """LoRA adapters that some agent has in discovery."""
        beats = [self.board.beat(name) for name in self._config.agent_names]
        return {name for beat in beats if beat is not None for name in beat.info.get("adapters", "").split("\n") if name}

    def _registered(self, name: str) -> bool:
        beat = self.board.beat(name)
        return beat is not None and bool(beat.numbers.get("registered"))

    @property
    def failed_reason(self) -> str:
        """Why the node will not come back by itself (the coordinator has given up on the engine); empty otherwise."""
        beat = self.board.beat("coordinator")
        return beat.info["reason"] if beat is not None and beat.info.get("node") == State.FAILED else ""
