"""Whether an engine works, from its own counters and its canaries. Pure: knows neither clock nor socket.

Time without a token proves nothing: a prefill may take a minute. What counts is that SGLang's scheduler goes on, and that what it
hands out comes out of the engine. Its counters come with each Beat of the engine (procs.engine.adapter.scheduler).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shared.frames import Beat

FIRST_SECONDS = 600.0
"""For the first canary of an incarnation: it may compile kernels."""
STRIKES = 2
"""Failures in a row before an engine that was healthy is not."""
LOOP_SECONDS = 10.0
"""An event loop that doesn't turn for so long serves nobody; a large prompt to tokenise holds it for less."""


@dataclass(frozen=True)
class Limits:
    """Seconds. ``wait``: without a step before a canary is sent. ``timeout``: for a canary, while nothing goes on.
    ``busy_stall``: for one step of the scheduler.
    """

    wait: float
    timeout: float
    busy_stall: float

    @property
    def loop(self) -> float:
        return min(LOOP_SECONDS, self.timeout)


@dataclass(frozen=True)
class Work:
    """What a Beat says of one DP rank, or of all."""

    steps: float = 0
    outputs: float = 0
    loops: float = 0
    transfers: float = 0
    step_seconds: float = 0
    """How long it has been in one step; 0: it is in none."""
    sampled_at: float = math.inf
    """When the oldest of these was read, in monotonic seconds; infinite for an engine that counts in its own process."""


def work_of(numbers: Mapping[str, float], rank: int | None) -> Work:
    """``rank`` None: all together. An engine without counters is known by the Step frames that it sends."""

    def found(name: str) -> list[float]:
        prefix = f"scheduler_{name}_dp"
        if rank is not None:
            return [numbers.get(f"{prefix}{rank}", 0.0)]
        return [value for key, value in numbers.items() if key.startswith(prefix)]

    if not any(key.startswith("scheduler_steps_dp") for key in numbers):
        return Work(steps=numbers.get("steps", 0.0))
    return Work(
        steps=sum(found("steps")),
        outputs=sum(found("outputs")),
        loops=sum(found("loops")),
        transfers=sum(found("transfers")),
        step_seconds=max(found("step_seconds"), default=0.0),
        sampled_at=min(found("sampled_at"), default=0.0) or math.inf,
    )


class Rank:
    """One DP rank. ``fine``: its last canary came through; None: none was answered yet. ``known``: one was, before a rest."""

    def __init__(self, limits: Limits, number: int | None, now: float, *, known: bool = False) -> None:
        self.number = number
        self.fine: bool | None = None
        self.reason = ""
        self._limits = limits
        self._passed = known
        self._strikes = 0
        self._work = Work()
        self._heard = self._progress = self._asked = now
        self._inside = now
        """When it was last known to be in a step."""

    def hear(self, beat: Beat, now: float, *, flows: bool) -> None:
        """``flows``: outputs have come out of the engine since the last Beat."""
        old, self._work = self._work, work_of(beat.numbers, self.number)
        self._heard = now
        if self._work.step_seconds:
            self._inside = now
        stepped = self._work.steps != old.steps
        # Requests whose KV cache is on its way can't step, but the loop turns. A control may take the whole loop.
        waits = self._work.transfers > 0 and self._work.loops != old.loops
        if stepped or waits or beat.numbers.get("controls"):
            self._progress = now
        if stepped and flows and self.fine:
            self._strikes = 0

    def due(self, now: float, *, canaries: bool) -> bool:
        """A canary is to be sent: nobody knows how it is, or it makes no steps."""
        if self.fine:
            return canaries and now - max(self._progress, self._asked) >= self._limits.wait
        return self.fine is None or now - self._asked >= self._limits.wait

    def late(self, sent: float, now: float) -> str:
        """Why a canary that is still out counts as failed; empty while it may take its time."""
        if not self._passed:
            return f"{self._words} had no token within {FIRST_SECONDS:.0f} s" if now - sent >= FIRST_SECONDS else ""
        quiet = now - max(sent, self._progress)
        if quiet < self._limits.timeout:
            return ""
        step = self._work.step_seconds and self._work.step_seconds + now - self._heard
        if not step:
            # A step that has just ended was no idleness, and its token may be on its way.
            quiet = now - max(sent, self._progress, self._inside)
            if quiet < self._limits.timeout:
                return ""
            return f"{self._words} had no token within {now - sent:.0f} s, and the scheduler made no step for {quiet:.0f} s"
        return (
            f"{self._words} had no token: the scheduler is in one step for {step:.0f} s"
            if step >= self._limits.busy_stall
            else ""
        )

    @property
    def _words(self) -> str:
        return "a canary" if self.number is None else f"a canary for DP rank {self.number}"

    def answered(self, now: float) -> None:
        self._passed = self.fine = True
        self._strikes, self.reason, self._asked = 0, "", now

    def failed(self, problem: str, now: float, *, again: bool) -> bool:
        """A canary has failed; ``again``: the next one follows at once. True when one more failure would be too many."""
        self._strikes += 1
        self._asked = now - self._limits.wait if again else now
        if self._strikes < STRIKES and self._passed and self.fine is not False:
            return True
        self.fine, self.reason = False, problem
        return False

    def doubt(self, reason: str) -> None:
        """Something else has shown that the engine is not well: a canary has to prove the contrary."""
        if self.fine is not False:  # what was seen first is what happened
            self.fine, self.reason = False, reason
            self._asked -= self._limits.wait  # at once


class WayOut:
    """Tokens that the scheduler hands out and that never come out of the engine: a dead connection."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._outputs = self._handed = self._newest = self._handed_at = self._flowed = -1.0
        self._since: float | None = None
        self._strikes = 0
        self.flows = False

    def hear(self, beat: Beat, now: float) -> None:
        numbers = beat.numbers
        work = work_of(numbers, None)
        outputs, handed = numbers.get("outputs", 0.0), work.outputs
        self._newest = handed
        self.flows = outputs != self._outputs
        if self.flows:
            self._strikes, self._flowed = 0, now
        # Outputs are counted live, the scheduler's file lags: what came out may be handed out only by the next sample's count.
        stale = self._handed_at < self._flowed
        # What was for an aborted request may end in the engine: without anybody who waits it says nothing.
        if self.flows or stale or not numbers.get("inflight") or numbers.get("controls") or handed < self._handed:
            self._outputs, self._handed, self._since = outputs, handed, None
            self._handed_at = work.sampled_at
        elif handed > self._handed and self._since is None:
            self._since = now

    def lost(self, now: float) -> str:
        """Why nothing comes out; empty when it may."""
        return "" if self._since is None or now - self._since < self._limits.timeout else self.words(now)

    def words(self, now: float) -> str:
        """Since when nothing has come out, of what was handed out; empty when all has."""
        if self._since is None:
            return ""
        return f"the scheduler has handed out tokens for {now - self._since:.0f} s, and none came out of the engine"

    def strike(self) -> bool:
        """True when one more would be too many. The next needs tokens that are handed out from now on."""
        self._strikes += 1
        self._handed, self._since = self._newest, None
        return self._strikes < STRIKES


class Detokenizer(WayOut):
    """Batches that SGLang's detokenizer was given and does not give back: ids, which pass it by, prove nothing."""

    def hear(self, beat: Beat, now: float) -> None:
        if "from_detokenizer" not in beat.numbers:  # several tokenizer workers: nobody counts
            return
        back = beat.numbers["from_detokenizer"]
        given = sum(value for key, value in beat.numbers.items() if key.startswith("scheduler_to_detokenizer_dp"))
        self.flows = back != self._outputs
        if self.flows:
            self._strikes = 0
        if self.flows or given <= back:
            self._outputs, self._since = back, None
        elif self._since is None:
            self._since = now

    def words(self, now: float) -> str:
        return (
            ""
            if self._since is None
            else f"SGLang's detokenizer has had tokens for {now - self._since:.0f} s, and gives none back"
        )


def blocked(beat: Beat, limits: Limits) -> str:
    """The engine's event loop doesn't turn: nothing goes in or out. Empty when it does."""
    lag = beat.numbers.get("loop_lag", 0.0)
    return f"the engine's event loop has not turned for {lag:.0f} s" if lag >= limits.loop else ""
