"""An agent's life: hears the node, registers when all conditions hold, withdraws when one fails, drains on SIGTERM."""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Coroutine
from typing import Any

import zmq

from procs.agent.controls import Controls
from procs.agent.drain import Drain
from procs.agent.files import FileHandler
from procs.agent.handler import Handler
from procs.agent.identity import Identity
from procs.agent.media import Intake
from procs.agent.output_store import OutputStore
from procs.agent.reach import endpoints, reachable
from procs.agent.tracing import make as make_tracing
from shared.config import NodeConfig
from shared.engine_client import EngineClient
from shared.frames import AnyState, Beat, Death, Intent, KvUse, Serving, Verdict
from shared.heart import Heart
from shared.roles import diffusion, find
from shared.roles.role import Role
from shared.sockets import Decoder, LoopSocket, subscriber
from shared.state import LOST, State

TICK_SECONDS = 0.5
"""How often deadlines (drain, retries) are looked at; everything else comes as a frame."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
RETRY_SECONDS = 1.0
"""After discovery refused a registration or a withdrawal."""
REGISTER_SECONDS = 120.0
"""For one registration: the first one reads the tokenizer, and may fetch it."""
HEARD_SECONDS = 5.0
"""For the engine's state to come after its answer; it is repeated twice a second."""
WITHDRAW_SECONDS = 5.0
"""For one withdrawal: a millisecond's work; a drain goes on without it."""


class Agent:
    """One agent. ``run`` returns when a stop has been carried out. Raises RuntimeError when Dynamo's runtime ends."""

    def __init__(self, config: NodeConfig, index: int) -> None:
        self._config = config
        self._name = config.agent_names[index]
        self._heart = Heart(config.path, self._name)
        self._changed = asyncio.Event()
        self._stop_asked = 0
        self._intent: Intent | None = None
        self._verdict: Verdict | None = None
        self._engine: Beat | None = None
        self._serving: Serving | None = None
        self._served = asyncio.Event()
        """Set at each new Serving."""
        self._registered = False
        self._listed = False
        """May be in discovery: a registration was begun, and no withdrawal has come through since."""
        self._withdrawn_at: float | None = None
        self._discovery: asyncio.Task[None] | None = None
        self._discovery_trouble = ""
        self._store_trouble = ""
        self._retry_at = 0.0
        self._drain: Drain | None = None
        self._refusing = ""
        self._decoder: Decoder[AnyState] = Decoder(AnyState, "node state")

    async def run(self) -> None:
        config = self._config
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._ask_stop)
        role = find(config.role, text=config.text_mode)
        self._client = EngineClient(config.path, self._name)
        self._client.on_change = self._changed.set
        self._handler = self._handler_of(role)
        self._handler.intake = Intake(config.media) if role.takes_media else None
        self._handler.on_change = self._changed.set
        self._handler.tracing = make_tracing(self._name, config.name)
        self._heart.numbers = self._numbers
        self._heart.set(State.WAITING, waiting_for="discovery")
        self._heart.start()
        if not await self._found_discovery():
            self._client.close()
            self._heart.close()
            return
        # Should Dynamo's runtime block after all, the signal's default action ends this process: it has nothing to finish.
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
        self._identity = Identity(config, self._name, role, self._handler)
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._ask_stop)
        self._identity.on_end = self._changed.set
        self._identity.controls = Controls(self._client, self._publish_adapter, self._revoke_adapter).endpoints
        self._heart.set(
            State.WAITING,
            waiting_for="the engine",
            info={"worker_id": self._identity.worker_id, "metrics_url": self._identity.metrics_url},
        )
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        names = ["engine", "keeper", "prober", "coordinator", "relay"]
        states = LoopSocket(subscriber(context, config.path, names), self._hear)
        try:
            await self._serve()
        finally:
            states.close()
            context.term()
            self._handler.peers.close()
            if self._handler.tracing is not None:
                self._handler.tracing.close()
            await self._identity.close()
            self._heart.set(State.STOPPED)
            self._client.close()
            self._heart.close()

    def _handler_of(self, role: Role) -> Handler:
        if role.engine != diffusion.ENGINE:
            return Handler(self._client, role, lambda: self._refusing)
        store = OutputStore(self._config.dynamo.media_output_fs_url, self._config.dynamo.media_output_http_url)
        return FileHandler(self._client, role, lambda: self._refusing, store)

    async def _found_discovery(self) -> bool:
        """Wait for etcd, where it is used. False when a stop was asked for meanwhile."""
        if self._config.dynamo.discovery_backend != "etcd":
            return True
        places = endpoints(os.environ)
        names = ", ".join(f"{host}:{port}" for host, port in places)
        while not self._stop_asked:
            looking: asyncio.Future[list[bool]] = asyncio.gather(*(reachable(*place) for place in places))
            stopping: asyncio.Future[Any] = asyncio.ensure_future(self._changed.wait())
            await asyncio.wait({looking, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if looking.done() and any(looking.result()):
                return True
            looking.cancel()
            self._changed.clear()
            self._heart.set(State.WAITING, waiting_for=f"etcd at {names}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_SECONDS):
                    await self._changed.wait()
        return False

    def _numbers(self) -> dict[str, float]:
        return {
            "inflight": self._handler.running,
            "streams_total": self._handler.total,
            "registered": float(self._registered),
            "drain_left_seconds": 0.0 if self._drain is None else self._drain.left(time.monotonic()),
            "dropped_frames": self._client.dropped + self._decoder.dropped,
            **self._handler.latency.numbers(),
        }

    # --- hearing -----------------------------------------------------------------------------------------------------

    def _ask_stop(self) -> None:
        self._stop_asked += 1
        if self._discovery is not None:
            self._discovery.cancel()  # a discovery service that hangs must not hold the stop
        self._changed.set()

    def _hear(self, parts: list[bytes]) -> None:
        frame: Any = self._decoder.decode(parts[0])
        match frame:
            case Beat():
                self._client.hear_beat(frame)
                if frame.process == "engine":
                    old, self._engine = self._engine, frame
                    if old is None or (frame.state, frame.incarnation) != (old.state, old.incarnation):
                        self._changed.set()
            case Death():
                self._client.hear_death(frame)
            case Verdict():
                if self._verdict != frame:
                    self._verdict = frame
                    self._changed.set()
            case Intent():
                if self._intent is None or (frame.want, frame.hurry) != (self._intent.want, self._intent.hurry):
                    self._intent = frame
                    self._changed.set()
            case Serving():
                if self._serving != frame:
                    self._serving = frame
                    self._served.set()
                    self._changed.set()
            case KvUse():
                if self._registered and self._engine is not None and frame.incarnation == self._engine.incarnation:
                    self._identity.publish_load(frame)

    # --- deciding ----------------------------------------------------------------------------------------------------

    def _unmet(self) -> str:
        """The first condition of being registered that does not hold, in an operator's words; empty when all do."""
        state = self._client.board.state("engine")
        if self._intent is None:
            return "the coordinator"  # a node that drains must not come back with a new agent
        if state == LOST:
            return "the engine (no sign of life)"
        welcome = self._client.welcome
        if welcome is None or state != State.READY:
            if self._client.refused:
                return f"an engine that speaks this protocol: {self._client.refused}"
            return f"the engine ({state})" if self._engine is not None else "the engine"
        if self._verdict is None or self._verdict.incarnation != welcome.incarnation:
            return "the first canary"
        return "" if self._verdict.healthy else f"a healthy engine ({self._verdict.reason})"

    @property
    def _draining(self) -> bool:
        return self._stop_asked > 0 or (self._intent is not None and self._intent.want in ("drain", "stop"))

    @property
    def _hurry(self) -> bool:
        return self._stop_asked > 1 or (self._intent is not None and self._intent.hurry)

    async def _serve(self) -> None:
        """Until a stop was asked for and carried out."""
        while True:
            self._changed.clear()
            if self._identity.ended:
                raise RuntimeError(f"Dynamo's runtime ended: {self._identity.ended}")
            unmet = self._unmet()
            if self._registered and self._identity.lost():
                logging.error("others have expired this worker in the file store: it is registered again")
                self._registered = False
            await self._follow(wanted=not unmet and not self._draining, why=unmet)
            if self._draining:
                if self._look_at_drain() and self._stop_asked:
                    return
            else:
                self._drain, self._refusing = None, ""
                trouble = self._identity.store_trouble()
                if trouble != self._store_trouble:
                    level = logging.ERROR if trouble else logging.INFO
                    logging.log(level, "%s", trouble or "the file store can be written again")
                    self._store_trouble = trouble
                if self._registered:
                    await self._follow_engine()
                    info = {**self._heart.beat.info, "adapters": "\n".join(self._identity.adapters)}
                    detail = f"worker {self._identity.worker_id}{trouble and f'; {trouble}'}"
                    self._heart.set(State.READY, detail, info=info)
                else:
                    waiting_for = "discovery" if self._discovery_trouble else unmet
                    self._heart.set(State.WAITING, trouble or self._discovery_trouble, waiting_for=waiting_for)
            try:
                async with asyncio.timeout(TICK_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                continue

    # --- discovery ---------------------------------------------------------------------------------------------------

    async def _follow(self, *, wanted: bool, why: str) -> None:
        """Be in discovery when wanted and out of it when not. What fails is tried again, and said."""
        if time.monotonic() < self._retry_at:
            return
        if wanted and not self._registered:
            await self._discover(self._register(), REGISTER_SECONDS)
        elif not wanted and self._listed:
            if self._withdrawn_at is None:
                self._withdrawn_at = time.monotonic()
                logging.info("withdrawing from discovery: %s", "draining" if self._draining else why)
            self._registered = False
            await self._discover(self._withdraw(), WITHDRAW_SECONDS)

    async def _follow_engine(self) -> None:
        """Adapters and taints of the engine that this worker is registered for."""
        serving, welcome = self._serving, self._client.welcome
        if serving is None or welcome is None or serving.incarnation != welcome.incarnation:
            return
        if time.monotonic() >= self._retry_at and not self._identity.follows(serving):
            await self._discover(self._identity.follow(serving), REGISTER_SECONDS)

    async def _publish_adapter(self, name: str, number: int) -> None:
        await self._hear_adapter(name, there=True)
        await self._identity.publish(name, number)

    async def _revoke_adapter(self, name: str) -> None:
        await self._hear_adapter(name, there=False)
        await self._identity.revoke(name)

    async def _hear_adapter(self, name: str, *, there: bool) -> None:
        """The answer of a control may be here before the state that came of it: an older one would undo what follows."""
        async with asyncio.timeout(HEARD_SECONDS):
            while self._serving is None or (name in self._serving.adapters) != there:
                self._served.clear()
                await self._served.wait()

    async def _discover(self, call: Coroutine[Any, Any, None], seconds: float) -> None:
        self._discovery = asyncio.ensure_future(call)
        await asyncio.wait([self._discovery], timeout=seconds)
        done, self._discovery = self._discovery, None
        self._discovery_trouble, self._retry_at = "", 0.0
        if not done.done():
            done.cancel()
            self._discovery_trouble = f"no answer within {seconds:.0f} s"
        elif done.cancelled():
            self._changed.set()
        elif (error := done.exception()) is not None:
            self._discovery_trouble = str(error) or type(error).__name__
        if self._discovery_trouble:
            self._retry_at = time.monotonic() + RETRY_SECONDS
            logging.error("discovery: %s", self._discovery_trouble)

    async def _register(self) -> None:
        welcome = self._client.welcome
        if welcome is None:
            return
        self._listed = True
        self._withdrawn_at = None
        await self._identity.register(welcome)
        self._registered = True
        logging.info("registered: worker %s, incarnation %d", self._identity.worker_id, welcome.incarnation)

    async def _withdraw(self) -> None:
        await self._identity.withdraw()
        self._listed = False

    # --- draining ----------------------------------------------------------------------------------------------------

    def _look_at_drain(self) -> bool:
        """Do what the drain's order says now. True when it is through."""
        now = time.monotonic()
        if self._drain is None:
            self._drain = Drain(self._config.drain_grace, self._config.drain_timeout, now)
        look = self._drain.look(now, running=self._handler.running, withdrawn_at=self._withdrawn_at, hurry=self._hurry)
        self._refusing = "the node is draining" if look.refuse else ""
        if look.cut:
            self._handler.cut()
        self._heart.set(State.DRAINED if look.done else State.DRAINING, look.detail, waiting_for=look.waiting_for)
        return look.done
