"""The coordinator's loop: hears every process, decides, starts the engine, reports to supervisord's plugin."""

import asyncio
import contextlib
import http.client
import json
import logging
import signal
import socket
import time
import xmlrpc.client
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import zmq

from procs.coordinator import crash, document, group
from procs.coordinator.conditions import Condition, waiting_for
from procs.coordinator.engine import EngineProgram
from procs.coordinator.load import Load
from procs.coordinator.node import ALIVE, Facts, NodeState, is_stuck, node_state
from procs.coordinator.restart import FollowerPolicy, RestartPolicy
from procs.coordinator.revoke import Revoker
from procs.coordinator.startup import StartUp
from shared import supervisord
from shared.config import EVENTS_SOCKET, LOG_DIR, NodeConfig
from shared.frames import AnyState, Beat, Death, Intent, KvUse, ProcessChange, Verdict
from shared.hang import Hangs
from shared.heart import Heart
from shared.sockets import Decoder, LoopSocket, subscriber
from shared.state import LOST, UP, Board, State

REPORT_SECONDS = 1.0
"""A status report at least so often; the plugin calls an older one stale."""
ADOPT_SECONDS = 1.5
"""Three beats: who has not been heard by then is silent."""
SETTLE_SECONDS = 0.02
"""Changes come in bursts (a death moves five states): one report for all."""
PROGRESS_SECONDS = 5.0
"""A drain's progress is in the log at most so often."""
RPC_SECONDS = 3.0
"""supervisord answers within milliseconds, or it is gone."""
READY_STATES = (*UP, State.DRAINING, State.DRAINED)
"""With one of these the engine has had a good life so far."""
END_AGAIN_SECONDS = 0.5
"""An engine whose epoch is over is told so again: its keeper may just have been starting."""
DEAD = ("EXITED", "BACKOFF", "FATAL")
"""supervisord's states of a program that ended without being asked to."""
CALL_ERRORS = (OSError, http.client.HTTPException, xmlrpc.client.Error)


class Coordinator:
    """One node's coordinator. Its death costs nothing: the next one asks supervisord and hears the beats again."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._board = Board()
        self._load = Load(config.path / LOG_DIR, config.model_path, time.monotonic)
        self._startup = StartUp(config)
        self._policy = RestartPolicy() if config.leads else FollowerPolicy()
        self._program = EngineProgram(self._policy, self._crashed)
        self._crashes = document.Crashes()
        self._bundling: set[asyncio.Task[None]] = set()
        self._hangs = Hangs(config.hang_timeout)
        self._revoker = Revoker(config.path)
        self._group = group.Group()
        """Of its own, until it is known whether an engine of an earlier coordinator's life is there."""
        self._conditions: list[Condition] = [lambda: self._group.unmet()]  # noqa: PLW0108 (it is replaced)
        self._starting = False
        """Between the decision to start the engine and supervisord's answer."""
        self._gone = ""
        """Why the engine is not there."""
        self._ending: asyncio.Task[None] | None = None
        self._engine_call = asyncio.Lock()
        """A signal for one life of the engine must not reach the next."""
        self._restarts = 0
        """How many restarts that persons asked for have been begun."""
        self._verdict: Verdict | None = None
        self._death: Death | None = None
        self._intent: Intent | None = None
        """As supervisord's plugin keeps it; nothing is said of it before the plugin was asked."""
        self._node = NodeState(State.STARTING)
        self._since = time.time()
        self._changed = asyncio.Event()
        self._end = asyncio.Event()
        self._silent = False
        self._said_streams = -1
        self._said_at = 0.0

    async def run(self) -> None:
        """Until SIGTERM."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._end.set)
        loop.add_signal_handler(signal.SIGINT, self._end.set)
        self._heart = Heart(self._config.path, "coordinator")
        self._heart.repeat = lambda: [] if self._intent is None else [self._intent]
        self._heart.start()
        self._heart.set(State.READY)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._states: Decoder[AnyState] = Decoder(AnyState, "node state")
        others = [name for name in self._config.processes if name != "coordinator"]
        states = LoopSocket(subscriber(context, self._config.path, others), self._on_state)
        hints = self._hint_socket()
        self._hints: Decoder[ProcessChange] = Decoder(ProcessChange, "supervisord's hints")
        loop.add_reader(hints.fileno(), self._on_hint, hints)
        working = loop.create_task(self._work())
        revoking = loop.create_task(self._revoker.run())
        ending = loop.create_task(self._end.wait())
        try:
            await asyncio.wait({working, revoking, ending}, return_when=asyncio.FIRST_COMPLETED)
            for task in (working, revoking):
                if task.done():
                    task.result()  # a defect: end with its traceback, supervisord starts a new one
        finally:
            self._group.close(leaving=self._wanted == "stop")
            revoking.cancel()
            working.cancel()
            ending.cancel()
            if self._ending is not None:
                self._ending.cancel()
            loop.remove_reader(hints.fileno())
            hints.close()
            states.close()
            context.term()
            self._heart.set(State.STOPPED)
            self._heart.close()

    def _hint_socket(self) -> socket.socket:
        path = self._config.path / EVENTS_SOCKET
        path.unlink(missing_ok=True)
        hints = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        hints.bind(str(path))
        return hints

    # --- hearing ---

    def _on_state(self, parts: list[bytes]) -> None:
        frame = self._states.decode(parts[0])
        if isinstance(frame, Beat | KvUse):
            self._load.hear(frame)
        if isinstance(frame, Beat):
            self._startup.hear(frame)
            old = self._board.heard.get(frame.process)
            was = None if old is None else (old.beat.waiting_for, old.beat.numbers.get("registered"))
            news = self._board.hear(frame) or was != (frame.waiting_for, frame.numbers.get("registered"))
        elif isinstance(frame, Death):
            # The first word on a death is the one that says why: an engine that we end says only that it was.
            news = self._death is None or self._death.incarnation < frame.incarnation
            self._death = frame if news else self._death
        elif isinstance(frame, Verdict):
            news = self._verdict != frame
            self._verdict = frame
        else:
            return
        if news:
            self._tell_group()
            self._changed.set()

    def _on_hint(self, hints: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                change = self._hints.decode(hints.recv(4096))
                if change is not None and change.process == "supervisord" and change.state == "STOPPING":
                    self._want("stop", "supervisord is stopping the node", hurry=self._hurry)
                elif change is not None and change.process == "engine":
                    self._program.state = change.state  # the only word on it while supervisord stops
                    self._say_keepers_death(change.state)
                    self._tell_group()
                elif change is not None and change.process in self._config.agent_names:
                    self._revoker.look.set()
                self._changed.set()

    def _say_keepers_death(self, program: str) -> None:
        """A keeper that was killed has said nothing, and its engine dies with it: the streams must not wait for silence."""
        incarnation, keeper = self._incarnation, self._board.heard.get("keeper")
        said = self._death is not None and self._death.incarnation >= incarnation
        if program not in DEAD or not incarnation or said or (keeper is not None and keeper.beat.state == State.STOPPED):
            return
        pid = keeper.beat.pid if keeper is not None else 0
        self._death = Death(incarnation, "keeper", pid, f"the keeper{f' (pid {pid})' if pid else ''} was killed", time.time())
        logging.error("engine %d is dead: %s", incarnation, self._death.reason)
        self._heart.publish(self._death)

    # --- the group ---

    def _tell_group(self) -> None:
        self._group.set_engine(*self._engine())

    def _engine(self) -> tuple[str, str]:
        """This node's engine in the group's words, and why it is gone."""
        program, death, engine = self._program, self._death, self._board.beat("engine")
        if self._starting:
            return "up", ""
        if program.failed and (program.restart_at is None or time.monotonic() < program.restart_at):
            return "dead", program.failed
        if program.state not in ALIVE:
            return "none", self._gone
        if self._wanted == "stop" and program.state == "STOPPING":
            return "dead", "the node is stopping"
        if death is not None and death.incarnation >= self._incarnation > 0:
            self._gone = death.reason
            return "dead", death.reason
        ready = engine is not None and engine.state in UP and engine.incarnation == self._incarnation
        return "ready" if ready else "up", ""

    def _epoch_over(self, reason: str, orderly: bool) -> None:
        """This node's engine has to end now: streams first, then the process, which may wait for a dead peer for ever."""
        stopping = self._wanted == "stop" and self._program.state == "STOPPING"  # supervisord ends it itself
        if stopping or (self._program.state not in ALIVE and not self._starting):
            return
        reason = f"epoch {self._group.epoch} is over: {reason}"
        if self._death is None or self._death.incarnation < self._incarnation:
            if orderly or not self._config.leads:
                self._program.ending(reason)  # nothing has failed here; what has is the leader's to count
            self._gone = reason
            self._death = Death(self._incarnation, "epoch", 0, reason, time.time())
            self._heart.publish(self._death)
            self._tell_group()
        if self._ending is None or self._ending.done():
            self._ending = asyncio.get_running_loop().create_task(self._end_engine())

    async def _end_engine(self) -> None:
        """Until it is gone. A keeper that gives no sign of life can only be killed, and the engine with it."""
        epoch = self._group.epoch
        while True:
            async with self._engine_call:
                if self._group.epoch != epoch or not (self._program.state in ALIVE or self._starting):
                    return
                number = "USR2" if self._board.state("keeper") != LOST else "KILL"
                with contextlib.suppress(*CALL_ERRORS):
                    await self._call("supervisor.signalProcess", "engine", number)
            await asyncio.sleep(END_AGAIN_SECONDS)

    @property
    def _incarnation(self) -> int:
        """The newest that was heard of: the engine may be heard before its keeper. 0: none yet."""
        return max((heard.beat.incarnation for name in ("keeper", "engine") if (heard := self._board.heard.get(name))), default=0)

    @property
    def _wanted(self) -> str:
        return self._intent.want if self._intent is not None else "serve"

    @property
    def _hurry(self) -> bool:
        return self._intent is not None and self._intent.hurry

    def _want(self, want: str, reason: str, *, hurry: bool) -> None:
        old = self._intent
        if old is not None and (old.want, old.hurry) == (want, hurry):
            return
        if old is not None:
            logging.info("the node shall %s%s: %s", want, " at once" if hurry else "", reason)
        self._intent = Intent(want, time.time() if old is None or old.want != want else old.since, reason, hurry)
        self._group.set_want(want)
        self._heart.publish(self._intent)
        self._changed.set()

    # --- deciding ---

    async def _adopt(self) -> None:
        """Go on where an earlier life of this process was killed: its last word is with the plugin.

        The node's state would otherwise flap until each process has been heard again.
        """
        last = await self._last_word()
        keeper: dict[str, Any] = next((row for row in last["processes"] if row["name"] == "keeper"), {})
        self._program.state = str(keeper.get("supervisor", ""))
        self._group = group.make(self._config, self._changed.set, self._epoch_over)
        self._group.begin(last, alive=self._program.state in ALIVE)
        self._wish(last)
        self._startup.remember(last.get("startup"))
        if not last["incarnation"]:
            return  # the node's first coordinator, or one before the first engine: nothing to go on with
        self._node, self._since = NodeState(State(last["state"]), last["reason"]), last["since"]
        self._remember(last)
        expected = {row["name"] for row in last["processes"] if row["pid"]} & set(self._config.processes) - {"coordinator"}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ADOPT_SECONDS):
                while expected - self._board.heard.keys():
                    self._changed.clear()
                    await self._changed.wait()

    async def _last_word(self) -> dict[str, Any]:
        """The status document that supervisord's plugin keeps. It answers also while it stops; without it we die too."""
        while True:
            try:
                return dict(json.loads(await self._call("sgnode.node")))
            except CALL_ERRORS as error:
                logging.warning("supervisord does not answer: %s", error)
                await asyncio.sleep(REPORT_SECONDS / 5)

    def _remember(self, last: dict[str, Any]) -> None:
        """The deaths before this coordinator's life count on."""
        self._crashes = document.Crashes(**{name: last[name] for name in asdict(self._crashes) if name in last})
        ahead = time.monotonic() - time.time()
        self._policy.deaths = [at + ahead for at in self._crashes.deaths]
        if self._crashes.restart_at is not None:
            self._program.restart_at = self._crashes.restart_at + ahead
        self._program.failed = self._crashes.failed
        self._restarts = last.get("restarts_begun", 0)

    async def _work(self) -> None:
        await self._adopt()
        self._startup.up(time.time())
        while True:
            self._changed.clear()
            try:
                await self._look_at_engine()
                await self._look_for_hangs()
                await self._report()
                self._silent = False
            except CALL_ERRORS as error:
                if not self._silent:
                    logging.warning("supervisord does not answer: %s", error)
                self._silent = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause()):
                    await self._changed.wait()
                    await asyncio.sleep(SETTLE_SECONDS)

    def _pause(self) -> float:
        at = self._program.restart_at
        return REPORT_SECONDS if at is None else max(0.01, min(REPORT_SECONDS, at - time.monotonic()))

    async def _call(self, method: str, *args: Any) -> Any:
        return await asyncio.to_thread(supervisord.call, self._config.path, method, *args, timeout=RPC_SECONDS)

    async def _look_at_engine(self) -> None:
        if self._wanted == "stop":
            self._tell_group()
            return
        try:
            info = await self._call("supervisor.getProcessInfo", "engine")
            self._starting = False  # supervisord has an answer, also to a start that it was slow to confirm
            if node_state(self._facts()).state in READY_STATES:
                self._policy.ready(time.monotonic())
                self._crashes.last_log = []
            due = self._program.look(info, time.monotonic(), self._death.reason if self._death else "")
            self._tell_group()
            if due and not waiting_for(self._conditions):
                await self._start_engine()
        except xmlrpc.client.Fault as fault:
            if fault.faultCode == supervisord.SHUTDOWN_STATE:
                self._want("stop", "supervisord is stopping the node", hurry=self._hurry)
            elif fault.faultCode != supervisord.ALREADY_STARTED:
                logging.warning("supervisord on the engine: %s", fault.faultString)

    async def _start_engine(self) -> None:
        self._program.starting()
        self._startup.asked(time.time())
        # What is still on the board belongs to the life before.
        self._board.forget("engine")
        self._board.forget("keeper")
        self._death, self._gone, self._starting = None, "", True
        try:
            self._group.starting()
            async with self._engine_call:
                await self._ask_start()
            self._program.look(await self._call("supervisor.getProcessInfo", "engine"), time.monotonic(), "")
        except xmlrpc.client.Fault as fault:
            self._starting = False
            if fault.faultCode in (supervisord.SHUTDOWN_STATE, supervisord.ALREADY_STARTED):
                raise
            self._gone = f"the engine could not be started: {fault.faultString}"
            self._program.not_started(fault.faultString, time.monotonic())
        self._starting = False
        self._tell_group()

    async def _ask_start(self) -> None:
        if self._config.nnodes > 1:
            await self._call("sgnode.start_engine")  # by its usual name it is refused to everybody
        else:
            await self._call("supervisor.startProcess", "engine", False)

    def _crashed(self, why: str) -> None:
        """Keep what there is to know of a death, beside the next start."""
        now, incarnation = time.time(), self._incarnation
        target = crash.place(self._config.path, incarnation, now)
        told = {"reason": why, "at": now, "incarnation": incarnation}
        self._crashes.last_crash = {**told, "path": str(target)}
        self._crashes.last_log = crash.last_lines(self._config.path)
        status = self._document(self._facts(), self._node)
        bundling = asyncio.get_running_loop().create_task(self._bundle(target, told, status))
        self._bundling.add(bundling)
        bundling.add_done_callback(self._bundling.discard)

    async def _bundle(self, target: Path, told: dict[str, Any], status: dict[str, Any]) -> None:
        try:
            await asyncio.to_thread(crash.write, target, self._config, told, status)
        except OSError as error:
            logging.warning("no crash bundle: %s: %s; make room there", error.strerror, target)

    async def _look_for_hangs(self) -> None:
        if self._wanted == "stop":
            return  # supervisord kills what does not stop
        facts = self._facts()
        silent = [name for name in ("relay", "prober", *self._config.agent_names) if self._board.state(name) == LOST]
        for name in self._hangs.look(time.monotonic(), engine_stuck=is_stuck(facts), silent=silent):
            # The keeper ends its engine and says so; one that hangs itself can only be killed, and the engine with it.
            number = "USR1" if name == "engine" and self._board.beat("keeper") is not None else "KILL"
            logging.error("%s hangs and is killed (SIG%s)", name, number)
            if name != "engine":
                self._board.forget(name)
            with contextlib.suppress(xmlrpc.client.Fault):  # it died just now
                await self._call("supervisor.signalProcess", name, number)

    # --- saying ---

    def _facts(self) -> Facts:
        keeper, engine = self._board.beat("keeper"), self._board.beat("engine")
        incarnation = keeper.incarnation if keeper else 0
        heard = self._board.heard.get("engine")
        lost = engine is None and heard is not None and heard.beat.incarnation == incarnation
        death = self._death
        if engine is not None and engine.incarnation < incarnation:
            engine = None
        if death is not None and keeper is not None and death.incarnation < incarnation:
            death = None
        at = self._program.restart_at
        return Facts(
            want=self._wanted,
            why_wanted=self._intent.reason if self._intent is not None else "",
            program=self._program.state,
            started=self._program.started,
            condition=waiting_for(self._conditions),
            restart_in=None if at is None else at - time.monotonic(),
            failed=self._program.failed,
            death=death.reason if death else "",
            engine=engine,
            engine_lost=lost,
            verdict=self._verdict,
            agents=[beat for name in self._config.agent_names if (beat := self._board.beat(name)) is not None],
            needs_agents=bool(self._config.agent_names),
            drain_timeout=self._config.drain_timeout,
            held=keeper.info.get("held", "") if keeper else "",
            killed_in=self._hangs.engine_left(),
            leader_state=self._group.leader_state,
            progress=self._group.progress,
        )

    def _document(self, facts: Facts, node: NodeState) -> dict[str, Any]:
        behind, at = time.time() - time.monotonic(), self._program.restart_at
        self._crashes.deaths = [death + behind for death in self._policy.deaths]
        self._crashes.restart_at = None if at is None else at + behind
        self._crashes.failed = self._program.failed
        built = document.build(
            self._config, self._board, facts, node, since=self._since, incarnation=self._incarnation, crashes=self._crashes
        )
        carried = self._load.document(facts.agents, self._incarnation, up=facts.engine is not None and not facts.death)
        alive = self._program.state in ALIVE or self._starting or not self._program.started
        carried["startup"] = self._startup.document(alive=alive and not facts.death)
        return {**built, **carried, "epoch": self._group.epoch, "restarts_begun": self._restarts, **self._group.document()}

    async def _report(self) -> None:
        facts = self._facts()
        node = node_state(facts)
        if node.state != self._node.state:
            logging.info("node: %s -> %s%s", self._node.state, node.state, f" ({node.reason})" if node.reason else "")
            self._since = time.time()
        elif (
            node.state == State.DRAINING
            and facts.streams != self._said_streams
            and time.time() - self._said_at > PROGRESS_SECONDS
        ):
            logging.info("%s", node.reason)
            self._said_streams, self._said_at = facts.streams, time.time()
        self._node = node
        self._startup.node_is(node.state, time.time())
        self._group.heed(facts, node)
        workers = self._group.workers(facts)
        self._heart.set(State.READY, info={"node": node.state, "reason": node.reason or node.state, "workers": ",".join(workers)})
        self._board.hear(msgspec.structs.replace(self._heart.beat, since=self._since))
        wanted = await self._call("sgnode.update", json.dumps(self._document(facts, node)))
        self._wish(wanted)
        if (restarts := wanted.get("restarts", 0)) > self._restarts:
            self._restarts = restarts
            self._program.again(time.monotonic())
            self._group.end("the engine is restarted by hand")
            self._changed.set()

    def _wish(self, wanted: dict[str, Any]) -> None:
        """Take what the plugin keeps, or what another rank needs of a node that shall serve."""
        wish = self._group.wish() if wanted["want"] == "serve" else ""
        if wish:
            self._want("drain", wish, hurry=False)
        else:
            self._want(wanted["want"], wanted.get("want_reason", wanted.get("reason", "")), hurry=wanted["hurry"])
