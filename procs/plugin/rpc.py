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
from supervisor.states import SupervisorStates, getProcessStateDescription

from procs.plugin import facts
from procs.plugin.notify import Notify
from procs.plugin.wakeup import Wakeup
from shared.config import EVENTS_SOCKET, LOG_DIR, NodeConfig
from shared.frames import ProcessChange

PATIENT_STATES = ("waiting", "starting", "loading", "warming", "draining")
"""Node states that take long on purpose: systemd is asked for more time while one lasts."""
SUPERVISORD = "supervisord"
"""Name in a ProcessChange for supervisord itself; its state STOPPING is the beginning of the node's stop."""


class Plugin:
    """Methods without an underscore are XML-RPC methods ``sgnode.NAME``. They never refuse, also not during shutdown."""

    def __init__(self, supervisord: Any, config: NodeConfig) -> None:
        self._supervisord = supervisord
        self._options = supervisord.options
        self._config = config
        self._document = facts.empty_document(config)
        self._heard: float | None = None
        self._starts: Counter[str] = Counter()
        self._notify = Notify()
        self._wakeup = Wakeup(self._options)
        self._events = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        events.subscribe(events.ProcessStateEvent, self._process_changed)
        events.subscribe(events.SupervisorRunningEvent, self._running)
        events.subscribe(events.SupervisorStoppingEvent, self._stopping)
        events.subscribe(events.Tick5Event, self._tick)

    # --- XML-RPC ---

    def update(self, text: str) -> bool:
        """Take the coordinator's status document

        @param string text       JSON object, keys as in `sgnode status --json`
        @return boolean result   True while supervisord runs, False once it is stopping
        """
        document = json.loads(text)
        if isinstance(document, dict):
            self._document = document
            self._heard = time.monotonic()
            self._tell_systemd()
        return not self._is_stopping

    def node(self) -> str:
        """The node's status as JSON, with supervisord's own facts about each process

        @return string result    JSON object
        """
        age = None if self._heard is None else time.monotonic() - self._heard
        return json.dumps(facts.merge(self._document, age, self._processes(), self._is_stopping))

    # --- inside ---

    @property
    def _is_stopping(self) -> bool:
        return bool(self._options.mood < SupervisorStates.RUNNING)

    def _processes(self) -> dict[str, facts.ProcessFacts]:
        found = {}
        for group in sorted(self._supervisord.process_groups.values()):
            for process in group.processes.values():
                name = make_namespec(group.config.name, process.config.name)
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
        name = make_namespec(process.group.config.name, process.config.name)
        if isinstance(event, events.ProcessStateStartingEvent):
            self._starts[name] += 1
        self._tell_coordinator(name, getProcessStateDescription(process.get_state()), process.pid)

    def _running(self, _event: Any) -> None:
        # supervisord takes SIGHUP as "restart everything"; a lost terminal shall end the node in order, like any program's.
        receive = self._options.signal_receiver.receive
        signal.signal(signal.SIGHUP, lambda _number, frame: receive(signal.SIGTERM, frame))
        atexit.register(_remove_runtime, self._config, os.getpid())

    def _stopping(self, _event: Any) -> None:
        self._notify.stopping()
        self._tell_coordinator(SUPERVISORD, "STOPPING", os.getpid())

    def _tick(self, _event: Any) -> None:
        self._notify.tick()
        if self._is_stopping:
            self._tell_systemd()

    def _tell_systemd(self) -> None:
        state, reason = str(self._document.get("state", "")), str(self._document.get("reason", ""))
        text = f"{state}: {reason}" if reason else state
        self._notify.status(state, text, patience=self._is_stopping or state in PATIENT_STATES)

    def _tell_coordinator(self, name: str, state: str, pid: int) -> None:
        frame = msgspec.msgpack.encode(ProcessChange(name, state, pid))
        with contextlib.suppress(OSError):  # not there or behind: it asks every second anyway
            self._events.sendto(frame, str(self._config.path / EVENTS_SOCKET))


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
