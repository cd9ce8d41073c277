"""The plugin in supervisord: wakes its loop, keeps the node's status, tells systemd and the coordinator, cleans up at the end."""

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import time
from collections import Counter
from typing import Any

import msgspec
from supervisor import events
from supervisor.options import make_namespec
from supervisor.rpcinterface import SupervisorNamespaceRPCInterface
from supervisor.states import SupervisorStates, getProcessStateDescription
from supervisor.xmlrpc import Faults, RPCError

from procs.plugin import facts, logfile
from procs.plugin.guard import ENGINE
from procs.plugin.journal import Journal, OwnLog
from procs.plugin.notify import Notify
from procs.plugin.pace import Pace
from procs.plugin.wakeup import Wakeup
from procs.plugin.wants import DRAIN, SERVE, STOP, Wants
from shared import logs
from shared.config import EVENTS_SOCKET, LOG_DIR, NodeConfig
from shared.frames import ProcessChange
from shared.hang import Hangs

SUPERVISORD = "supervisord"
"""Name in a ProcessChange for supervisord itself; its state STOPPING is the beginning of the node's stop."""
STILL_ALIVE = (events.ProcessStateRunningEvent, events.ProcessStateStoppingEvent)
"""After these a process may go on with its last line of output."""
COORDINATOR = "coordinator"
AGENTS = "agent"
"""The group of programs whose streams a drain waits for."""
HOLD_MARGIN_SECONDS = 10.0
"""On top of drain grace and timeout, for the leader to say that it has drained."""
HURRIED_STOP_SECONDS = 5
"""From a program's SIGTERM to its SIGKILL once a fast stop is asked for: nothing is waited for any more."""


class Plugin:
    """Methods without an underscore are XML-RPC methods ``sgnode.NAME``. They never refuse, also not during shutdown."""

    def __init__(self, supervisord: Any, config: NodeConfig) -> None:
        self._supervisord = supervisord
        self._options = supervisord.options
        self.config = config
        self._hold_until: float | None = None
        """A follower's stop waits so long for the leader's drain (monotonic seconds)."""
        self._document = facts.empty_document(config)
        self._heard: float | None = None
        self._wants = Wants()
        self._hangs = Hangs(0)
        self._starts: Counter[str] = Counter()
        self._notify = Notify()
        self._wakeup = Wakeup(self._options, self._round)
        Pace(supervisord)
        logs.facts.update(process=SUPERVISORD, pid=os.getpid(), node=config.name)
        logfile.install(self._options.logger)
        self._journal: Journal | None = None
        self._events = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        events.subscribe(events.ProcessStateEvent, self._process_changed)
        events.subscribe(events.SupervisorRunningEvent, self._running)
        events.subscribe(events.SupervisorStoppingEvent, self._stopping)
        if self._notify.listening:
            self._journal = Journal(config.name, self._options.get_socket_map())
            self._options.logger.addHandler(OwnLog(self._journal))
            events.subscribe(events.ProcessLogEvent, self._said)
        self._tell_systemd()

    # --- XML-RPC ---

    def update(self, text: str) -> dict[str, Any]:
        """Take the coordinator's status document

        @param string text       JSON object, keys as in `sgnode status --json`
        @return struct result    What is wanted of the node: want, reason, since, hurry
        """
        document = json.loads(text)
        if isinstance(document, dict):
            self._document = document
            self._heard = time.monotonic()
            self._tell_systemd()
            if self._hold_until is not None and not document.get("holds_stop"):
                self._release("the leader has drained")
        return self._wants.plain()

    def node(self) -> str:
        """The node's status as JSON, with supervisord's own facts about each process

        @return string result    JSON object
        """
        age = None if self._heard is None else time.monotonic() - self._heard
        document = facts.merge(self._document, age, self._processes(), self._ending)
        wants = self._wants
        return json.dumps(
            {**document, "want": wants.want, "want_reason": wants.reason, "hurry": wants.hurry, "logs": logfile.look()}
        )

    def want(self, want: str, reason: str) -> bool:
        """Drain the node or let it serve again

        @param string want       "drain" or "serve"
        @param string reason     one line for the status
        @return boolean result   False when that was wanted already
        """
        if want not in (SERVE, DRAIN):
            raise RPCError(Faults.INCORRECT_PARAMETERS, f"want: expected {SERVE!r} or {DRAIN!r}, got {want!r}")
        if self._ending:
            raise RPCError(Faults.FAILED, "the node is stopping; that can't be taken back")
        changed = self._wants.change(want, reason)
        if changed:
            self._tell_coordinator(SUPERVISORD, "RUNNING", os.getpid())
        return changed

    def hurry(self) -> bool:
        """End what a drain or a stop still waits for, now

        @return boolean result   False when the node neither drains nor stops
        """
        if self._wants.want == SERVE and not self._is_stopping:
            return False
        self._wants.hurry = True
        self._release("at once")
        for group in self._supervisord.process_groups.values():
            for process in group.processes.values():
                if group.config.name != ENGINE:  # its keeper has counted on the time
                    process.config.stopwaitsecs = min(process.config.stopwaitsecs, HURRIED_STOP_SECONDS)
                if group.config.name == AGENTS and process.pid and self._is_stopping:
                    # To an agent a second SIGTERM means the same, should the coordinator not be there to say it.
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGTERM)
        self._tell_coordinator(SUPERVISORD, "STOPPING" if self._is_stopping else "RUNNING", os.getpid())
        return True

    def start_engine(self) -> bool:
        """Start the engine, for the coordinator of a group: it knows the epoch

        @return boolean result   True
        """
        return bool(SupervisorNamespaceRPCInterface(self._supervisord).startProcess(ENGINE, False))

    def restart_engine(self) -> bool:
        """Restart the engines of the group, on rank 0; earlier deaths are forgotten

        @return boolean result   True
        """
        if self.config.nnodes == 1 or not self.config.leads:
            raise RPCError(Faults.FAILED, "only rank 0 of a group restarts its engines together")
        self._wants.restarts += 1
        self._tell_coordinator(SUPERVISORD, "RUNNING", os.getpid())
        return True

    @property
    def serves(self) -> bool:
        """Streams may be running, or come: an end of the engine would cut them."""
        document = self._document
        # The engine's own count is half a second old at worst: agents that are all drained know better.
        return bool(document.get("registered") or (document.get("inflight") and document.get("state") != "drained"))

    # --- a follower's stop ---

    def hold(self) -> bool:
        """Begin the stop of a follower: the leader drains first. False when nothing has to be waited for."""
        if self.config.leads or self._ending or not self._document.get("holds_stop"):
            return False
        bound = self.config.drain_grace + self.config.drain_timeout + HOLD_MARGIN_SECONDS
        self._hold_until = time.monotonic() + bound
        self._options.logger.info(f"the leader is asked to drain before this node stops, at most {bound:.0f} s")
        self._wants.change(STOP, "this node is stopping")
        self._notify.stopping()
        self._tell_coordinator(SUPERVISORD, "RUNNING", os.getpid())
        return True

    def _release(self, why: str) -> None:
        if self._hold_until is not None:
            self._hold_until = None
            self._options.logger.info(f"this node stops now: {why}")
            self._options.signal_receiver.receive(signal.SIGTERM, None)
            self._wakeup.poke()

    def _round(self) -> None:
        """In each round of supervisord's loop."""
        self._notify.round(stopping=self._ending)
        now = time.monotonic()
        if self._hold_until is not None and now > self._hold_until:
            self._release("the leader has not drained in time")
        self._look_at_coordinator(now)

    def _look_at_coordinator(self, now: float) -> None:
        """Who looks after the others hangs as well as they do: killed after the same time without a word."""
        group = self._supervisord.process_groups.get(COORDINATOR)
        pids = [process.pid for process in group.processes.values() if process.pid] if group is not None else []
        silent = pids and (self._heard is None or now - self._heard > facts.STALE_SECONDS)
        for _ in self._hangs.look(now, engine_stuck=False, silent=[COORDINATOR] if silent else []):
            self._options.logger.warn(f"the coordinator (pid {pids[0]}) says nothing any more and is killed")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[0], signal.SIGKILL)

    @property
    def _ending(self) -> bool:
        return self._is_stopping or self._hold_until is not None

    # --- inside ---

    @property
    def _is_stopping(self) -> bool:
        return bool(self._options.mood < SupervisorStates.RUNNING)

    def _processes(self) -> dict[str, facts.ProcessFacts]:
        found = {}
        for group in sorted(self._supervisord.process_groups.values()):
            for process in group.processes.values():
                name = _name_of(process)
                found[name] = facts.ProcessFacts(
                    pid=process.pid,
                    state=getProcessStateDescription(process.get_state()),
                    started=process.laststart,
                    restarts=max(0, self._starts[name] - 1),
                    problem=process.spawnerr or "",
                )
        return found

    def _process_changed(self, event: Any) -> None:
        # The loop spawns, stops and reports once a round: let the next one begin now.
        self._wakeup.poke()
        process = event.process
        name = _name_of(process)
        if isinstance(event, events.ProcessStateStartingEvent):
            self._starts[name] += 1
        if self._journal is not None and not isinstance(
            event, events.ProcessStateRunningEvent | events.ProcessStateStoppingEvent
        ):
            self._journal.end(name)
        self._tell_coordinator(name, getProcessStateDescription(process.get_state()), process.pid)

    def _running(self, _event: Any) -> None:
        # supervisord takes SIGHUP as "restart everything"; a lost terminal shall end the node in order, like any program's.
        receive = self._options.signal_receiver.receive
        signal.signal(signal.SIGHUP, lambda _number, frame: receive(signal.SIGTERM, frame))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop_signal)
        atexit.register(_remove_runtime, self.config, os.getpid())

    def _stop_signal(self, number: int, frame: Any) -> None:
        """The first begins the stop; supervisor 4.3 ignores every further one, which means a fast stop to everybody else."""
        if self._ending and not self._wants.hurry:
            self.hurry()
        elif self.hold():
            return
        self._options.signal_receiver.receive(number, frame)

    def _stopping(self, _event: Any) -> None:
        self._wants.change(STOP, "supervisord is stopping the node")
        self._notify.stopping()
        self._tell_coordinator(SUPERVISORD, "STOPPING", os.getpid())

    def _said(self, event: Any) -> None:
        if self._journal is not None:
            self._journal.take(_name_of(event.process), event.pid, event.data)

    def _tell_systemd(self) -> None:
        self._notify.report(self._document, stopping=self._ending)

    def _tell_coordinator(self, name: str, state: str, pid: int) -> None:
        frame = msgspec.msgpack.encode(ProcessChange(name, state, pid))
        with contextlib.suppress(OSError):  # not there or behind: it asks every second anyway
            self._events.sendto(frame, str(self.config.path / EVENTS_SOCKET))


def _name_of(process: Any) -> str:
    """``engine``, ``agent:0``."""
    return str(make_namespec(process.group.config.name, process.config.name))


def _remove_runtime(config: NodeConfig, pid: int) -> None:
    """At supervisord's exit: everything in the runtime directory goes, but the logs."""
    if os.getpid() != pid:
        return
    with contextlib.suppress(OSError):
        for path in config.path.iterdir():
            if path.name == LOG_DIR:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
