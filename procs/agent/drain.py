"""The order of a drain: grace, refusal, running streams, deadline, cut. Pure: time comes in, a decision comes out."""

from dataclasses import dataclass

CUT_SECONDS = 1.0
"""After the cut, for the errors to leave: a client that takes nothing is not waited for any longer."""


@dataclass(frozen=True)
class Look:
    """What one look at a drain says has to be done now."""

    refuse: bool
    """New requests get the migratable error."""
    cut: bool
    """Running streams end with the migratable error."""
    done: bool
    detail: str = ""
    waiting_for: str = ""


class Drain:
    """One drain, from its first look. ``grace`` and ``timeout`` in seconds."""

    def __init__(self, grace: float, timeout: float, started: float) -> None:
        self._grace = grace
        self._timeout = timeout
        self._started = started
        self._cut_at: float | None = None

    def left(self, now: float) -> float:
        """Seconds until what still runs is cut."""
        return max(0.0, self._timeout - (now - self._started))

    def look(self, now: float, *, running: int, withdrawn_at: float | None, hurry: bool) -> Look:
        """``withdrawn_at``: when this worker left discovery, None when it never was there; ``hurry`` skips all waiting.

        A router that hasn't heard of the withdrawal yet still sends requests: they are served during the grace.
        """
        grace = 0.0 if withdrawn_at is None else max(0.0, self._grace - (now - withdrawn_at))
        left = self.left(now)
        refuse = hurry or grace == 0.0
        if not running:
            if refuse:
                return Look(refuse, False, True)
            return Look(refuse, False, False, f"draining: no stream left, {grace:.0f} s of grace", "the grace's end")
        cut = hurry or left == 0.0
        if cut and self._cut_at is None:
            self._cut_at = now
        done = self._cut_at is not None and now - self._cut_at >= CUT_SECONDS
        plural = "stream" if running == 1 else "streams"
        return Look(
            refuse or cut, cut, done, f"draining: {running} {plural} left, {left:.0f} s of {self._timeout:.0f}", "running streams"
        )
