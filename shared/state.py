"""Node and process states, and the board on which a process keeps what it heard from the others."""

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from shared.frames import Beat

BEAT_SECONDS = 0.5
"""Interval of Beat frames."""
BEAT_DEADLINE_SECONDS = 2.0
"""A process not heard for so long is ``lost``: four missed beats (design: node state)."""


class State(enum.StrEnum):
    """States of the node and of each process, with the meaning of the design's list."""

    WAITING = "waiting"
    STARTING = "starting"
    LOADING = "loading"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    DRAINED = "drained"
    PAUSED = "paused"
    SLEEPING = "sleeping"
    UNHEALTHY = "unhealthy"
    FAILED = "failed"
    STOPPED = "stopped"


UP = (State.READY, State.PAUSED, State.SLEEPING)
"""States of an engine that answers: what it may be asked for differs."""
LOST = "lost"
"""Not a state that a process reports: its beats stopped coming."""


@dataclass
class Heard:
    """The latest Beat of one process and when it came (monotonic seconds)."""

    beat: Beat
    at: float

    def lost(self, now: float) -> bool:
        return now - self.at > BEAT_DEADLINE_SECONDS


@dataclass
class Board:
    """Latest beats by process name. A missed deadline reads as ``lost``."""

    clock: Callable[[], float] = time.monotonic
    heard: dict[str, Heard] = field(default_factory=dict)

    def hear(self, beat: Beat) -> bool:
        """Keep a beat; True when it changed the process's state, pid or incarnation."""
        old = self.heard.get(beat.process)
        self.heard[beat.process] = Heard(beat, self.clock())
        if old is None:
            return True
        was = old.beat
        return (was.state, was.pid, was.incarnation) != (beat.state, beat.pid, beat.incarnation)

    def beat(self, process: str) -> Beat | None:
        """The latest beat of a process that still meets its deadline."""
        heard = self.heard.get(process)
        return None if heard is None or heard.lost(self.clock()) else heard.beat

    def state(self, process: str) -> str:
        """State of a process: ``waiting`` if never heard, ``lost`` past its deadline."""
        heard = self.heard.get(process)
        if heard is None:
            return State.WAITING
        return LOST if heard.lost(self.clock()) else heard.beat.state

    def forget(self, process: str) -> None:
        self.heard.pop(process, None)
