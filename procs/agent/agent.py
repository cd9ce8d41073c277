"""An agent's life: hears the node, registers when all conditions hold, withdraws when one fails, drains on SIGTERM."""

import asyncio
import logging
import signal
import time
from typing import Any

import zmq

from procs.agent.handler import Handler
from procs.agent.identity import Identity
from shared.config import NodeConfig
from shared.engine_client import EngineClient
from shared.frames import AnyState, Beat, Death, Intent, KvUse, Verdict
from shared.heart import Heart
from shared.roles import find
from shared.sockets import Decoder, LoopSocket, subscriber
from shared.state import BEAT_DEADLINE_SECONDS, State

TICK_SECONDS = 0.5
"""How often deadlines (lost engine, drain progress) are looked at; everything else comes as a frame."""
RETRY_SECONDS = 1.0
"""After discovery refused a registration or a withdrawal."""


class Agent:
    """One agent. ``run`` returns when a stop has been carried out."""

    def __init__(self, config: NodeConfig, index: int) -> None:
        self._config = config
        self._name = config.agent_names[index]
        self._heart = Heart(config.path, self._name)
        self._changed = asyncio.Event()
        self._stop_asked = 0
        self._want = "serve"
        self._verdict: Verdict | None = None
        self._engine: Beat | None = None
        self._engine_heard = 0.0
        self._registered = False
        self._ever_registered = False
        self._withdrawn_at: float | None = None
        self._drain_started: float | None = None
        self._refusing = ""
        self._decoder: Decoder[AnyState] = Decoder(AnyState, "node state")

    async def run(self) -> None:
        config = self._config
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ask_stop)
        role = find(config.role)
        self._client = EngineClient(config.path, self._name)
        self._client.on_change = self._changed.set
        self._handler = Handler(self._client, role, lambda: self._refusing)
        self._handler.on_change = self._changed.set
        self._heart.numbers = self._numbers
        self._heart.set(State.WAITING, waiting_for="the engine")
        self._heart.start()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        names = ["engine", "keeper", "prober", "coordinator", "relay"]
        states = LoopSocket(subscriber(context, config.path, names), self._hear)
        self._identity = Identity(config, role, self._handler)
        self._heart.set(
            State.WAITING,
            waiting_for="the engine",
            info={"worker_id": self._identity.worker_id, "metrics_url": self._identity.metrics_url},
        )
        await self._serve()
        states.close()
        context.term()
        self._heart.set(State.STOPPED)
        self._client.close()
        await self._identity.close()
        self._heart.close()

    def _numbers(self) -> dict[str, float]:
        return {
            "inflight": self._handler.running,
            "requests": self._handler.total,
            "registered": float(self._registered),
            "dropped_frames": self._client.dropped + self._decoder.dropped,
        }

    # --- hearing -----------------------------------------------------------------------------------------------------

    def _ask_stop(self) -> None:
        self._stop_asked += 1
        self._changed.set()

    def _hear(self, parts: list[bytes]) -> None:
        frame: Any = self._decoder.decode(parts[0])
        match frame:
            case Beat(process="engine"):
                self._engine_heard = time.monotonic()
                news = self._engine is None or (frame.state, frame.incarnation) != (self._engine.state, self._engine.incarnation)
                self._engine = frame
                self._client.hear_beat(frame)
                if news:
                    self._changed.set()
            case Death():
                self._client.hear_death(frame)
            case Verdict():
                if self._verdict != frame:
                    self._verdict = frame
                    self._changed.set()
            case Intent():
                if self._want != frame.want:
                    self._want = frame.want
                    self._changed.set()
            case KvUse():
                if self._registered and self._engine is not None and frame.incarnation == self._engine.incarnation:
                    self._identity.publish_load(frame)

    # --- deciding ----------------------------------------------------------------------------------------------------

    def _unmet(self) -> str:
        """The first condition of being registered that does not hold, in an operator's words; empty when all do."""
        welcome = self._client.welcome
        if welcome is None:
            if self._client.refused:
                return f"an engine that speaks this protocol: {self._client.refused}"
            return f"the engine ({self._engine.state})" if self._engine is not None else "the engine"
        if time.monotonic() - self._engine_heard > BEAT_DEADLINE_SECONDS:
            return "the engine (no sign of life)"
        if self._verdict is None or self._verdict.incarnation != welcome.incarnation:
            return "the first canary"
        return "" if self._verdict.healthy else f"a healthy engine ({self._verdict.reason})"

    @property
    def _draining(self) -> bool:
        return self._stop_asked > 0 or self._want in ("drain", "stop")

    async def _serve(self) -> None:
        """Until a stop was asked for and carried out."""
        while True:
            self._changed.clear()
            unmet = self._unmet()
            wanted = not unmet and not self._draining
            try:
                if wanted and not self._registered:
                    await self._register()
                elif not wanted and self._registered:
                    await self._withdraw()
            except Exception as error:  # discovery may fail in any way; the agent tries again and says so
                logging.error("discovery: %s", error)
                self._heart.set(State.WAITING, str(error), waiting_for="discovery")
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if self._draining:
                if self._drained() and self._stop_asked:
                    return
            else:
                self._resume()
                if self._registered:
                    self._heart.set(State.READY, f"worker {self._identity.worker_id}")
                else:
                    self._heart.set(State.WAITING, waiting_for=unmet)
            try:
                async with asyncio.timeout(TICK_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                self._look_at_engine()

    async def _register(self) -> None:
        welcome = self._client.welcome
        assert welcome is not None
        await self._identity.register(welcome)
        self._registered = self._ever_registered = True
        self._withdrawn_at = None
        logging.info("registered: worker %s, incarnation %d", self._identity.worker_id, welcome.incarnation)

    async def _withdraw(self) -> None:
        self._registered = False
        self._withdrawn_at = time.monotonic()
        await self._identity.withdraw()
        logging.info("withdrawn from discovery: %s", "draining" if self._draining else self._unmet())

    def _look_at_engine(self) -> None:
        """An engine that says nothing and has no keeper to say so is lost by its deadline."""
        if self._engine is not None and time.monotonic() - self._engine_heard > BEAT_DEADLINE_SECONDS:
            self._changed.set()

    # --- draining ----------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        self._refusing = ""
        self._drain_started = None

    def _drained(self) -> bool:
        """One look at the drain: grace, refusal, deadline. True when nothing runs and nothing may come."""
        now = time.monotonic()
        if self._drain_started is None:
            self._drain_started = now
        running = self._handler.running
        # A router that has not heard of the withdrawal yet still sends requests: they are served during the grace.
        since = self._withdrawn_at if self._withdrawn_at is not None else now
        grace_left = self._config.drain_grace - (now - since) if self._ever_registered else 0.0
        fast = self._stop_asked > 1
        if grace_left <= 0 or fast:
            self._refusing = "the node is draining"
        left = self._config.drain_timeout - (now - self._drain_started)
        if running and (left <= 0 or fast):
            self._handler.cut.set()
        if running:
            detail = f"draining: {running} stream{'s' if running > 1 else ''} left, {max(0.0, left):.0f} s of "
            self._heart.set(State.DRAINING, f"{detail}{self._config.drain_timeout:.0f}", waiting_for="running streams")
            return False
        if grace_left > 0 and not fast:
            self._heart.set(
                State.DRAINING, f"draining: no stream left, {grace_left:.0f} s of grace", waiting_for="the grace's end"
            )
            return False
        self._heart.set(State.DRAINED, "")
        return True
