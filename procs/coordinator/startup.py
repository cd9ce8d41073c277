"""Where the seconds of the engine's start went, from what the processes have marked (pure). All times are UNIX seconds."""

from collections.abc import Mapping
from typing import Any

from shared.config import NodeConfig
from shared.frames import Beat
from shared.state import UP, State

PHASES = (
    ("check", "checked"),
    ("processes", "up"),
    ("ranks", "asked"),
    ("keeper", "forked"),
    ("imports", "imported"),
    ("children", "children"),
    ("init", "weights"),
    ("weights", "loaded"),
    ("kv_cache", "pool"),
    ("graphs", "captured"),
    ("load", "warming"),
    ("warm_up", "ready"),
    ("registered", "serving"),
)
"""What takes time, with the mark that ends it. A mark that is missing gives its time to the next phase.

``check`` and ``processes``: of the node's first engine only. ``ranks``: of a group. ``children``: SGLang's processes import all
that the engine's has imported. ``init``: they find each other and the model's class. From ``imports`` to ``graphs`` SGLang's log
is what marks (procs/engine/load_progress.py); where it says nothing all of that is ``load``.
"""
LOGGED = ("imported", "children", "weights", "loaded", "pool", "captured")
DONE = (*UP, State.DRAINING, State.DRAINED)
"""States of a node whose engine is up. One that shall not serve has nothing to register."""


class StartUp:
    """The newest engine's."""

    def __init__(self, config: NodeConfig) -> None:
        self._single = config.nnodes == 1
        self._says = config.engine != "synthetic"
        self._marks: dict[str, float] = {}
        if config.begun:
            self._marks = {"begun": config.begun, "checked": config.checked}
        self._incarnation = 0
        """0: not heard yet."""
        self._over = 0
        """The one before."""
        self._done = False

    def remember(self, last: Mapping[str, Any] | None) -> None:
        """What an earlier coordinator knew: the document that it reported."""
        if last:
            self._marks = dict(last["marks"])
            self._incarnation, self._done = last["incarnation"], last["done"]

    def up(self, now: float) -> None:
        """The coordinator could start the engine, were its conditions met."""
        if not self._incarnation:
            self._marks.setdefault("up", now)

    def asked(self, now: float) -> None:
        """The engine is about to be started."""
        if self._incarnation:  # not the node's first
            self._begin({"begun": now})
        self._marks["asked"] = now

    def hear(self, beat: Beat) -> None:
        """Of the keeper and the engine."""
        if beat.process not in ("keeper", "engine") or beat.incarnation < self._incarnation or beat.incarnation <= self._over:
            return
        if beat.incarnation > self._incarnation:
            if self._incarnation or (beat.incarnation > 1 and "asked" not in self._marks):
                self._begin({"begun": beat.since})  # somebody else than this coordinator has started it
            self._incarnation = beat.incarnation
        if beat.process == "engine":
            marks = {name: at for name, at in beat.marks.items() if name in LOGGED}
            if beat.state in (State.WARMING, State.READY):
                marks[beat.state] = beat.since
        else:
            marks = {name: at for name, at in beat.marks.items() if name == "forked"}
        self._marks = {**marks, **self._marks, **{name: at for name, at in marks.items() if name == "captured"}}

    def node_is(self, state: str, now: float) -> None:
        """The node's state: the first in which it serves ends the start-up."""
        if not self._done and "ready" in self._marks and state in DONE:
            self._done = True
            if state == State.READY:
                self._marks["serving"] = now

    def _begin(self, marks: dict[str, float]) -> None:
        self._marks, self._over, self._incarnation, self._done = marks, self._incarnation, 0, False

    def document(self, *, alive: bool) -> dict[str, Any] | None:
        """``startup`` of the status document; None before anything is known. ``alive``: there is an engine, or will be at once.

        Seconds by phase, ``current`` the one that goes on ``since``, None when it is done, or was broken off.
        """
        at = self._marks.get("begun")
        if at is None:
            return None
        begun, seconds, ended = at, {}, -1
        for index, (phase, mark) in enumerate(PHASES):
            if mark in self._marks and not self._left_out(phase):
                seconds[phase] = round(max(0.0, self._marks[mark] - at), 2)
                at, ended = max(at, self._marks[mark]), index
        going = [phase for phase, _ in PHASES[ended + 1 :] if not self._left_out(phase)]
        current = going[0] if going and alive and not self._done else None
        return {
            "incarnation": self._incarnation,
            "begun": begun,
            "done": self._done,
            "seconds": round(at - begun, 2),
            "phases": seconds,
            "current": current,
            "since": at if current else None,
            "marks": self._marks,
        }

    def _left_out(self, phase: str) -> bool:
        """Is no phase of this start-up."""
        if phase == "ranks":
            return self._single
        if phase in ("check", "processes"):
            return "checked" not in self._marks
        logged = any(mark in self._marks for mark in LOGGED)
        if phase == "load":
            return logged or (self._says and "warming" not in self._marks)
        return not self._says and dict(PHASES)[phase] in LOGGED
