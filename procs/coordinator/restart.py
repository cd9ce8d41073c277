"""When a dead engine may start again: at once, then with back-off, and an end to a crash loop (pure)."""

BACKOFF_FIRST_SECONDS = 1.0
"""After the second death in a row; the first one's restart waits for nothing."""
BACKOFF_MOST_SECONDS = 60.0
CALM_SECONDS = 300.0
"""An engine that was ready for so long had a good life: earlier deaths are forgotten."""
REMEMBERED = 16
"""Deaths: more than the longest back-off and a loop need."""
LOOP_DEATHS = 5
LOOP_SECONDS = 600.0
"""So many deaths within so many seconds are a crash loop: a person has to look."""


class RestartPolicy:
    """Counts deaths. All times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self.deaths: list[float] = []
        """Since the last good life or the last start by hand."""
        self._ready_since: float | None = None

    def ready(self, now: float) -> None:
        """The engine is ready (say it as often as it is)."""
        if self._ready_since is None:
            self._ready_since = now
        elif now - self._ready_since >= CALM_SECONDS:
            self.deaths.clear()

    def died(self, now: float) -> float | None:
        """The engine died: seconds to wait before its next start, or None when it must not start again by itself."""
        self._ready_since = None
        self.deaths.append(now)
        if sum(now - death <= LOOP_SECONDS for death in self.deaths) >= LOOP_DEATHS:
            return None
        del self.deaths[:-REMEMBERED]
        before = len(self.deaths) - 1
        return min(BACKOFF_FIRST_SECONDS * 2 ** (before - 1), BACKOFF_MOST_SECONDS) if before else 0.0

    def words(self, delay: float) -> str:
        """When the next start is, for the log."""
        return f"next start in {delay:.0f} s" if delay else "next start at once"

    def reset(self) -> None:
        """A person started the engine: nothing that was before counts."""
        self.deaths.clear()
        self._ready_since = None


class FollowerPolicy(RestartPolicy):
    """A follower's: back-off and crash loops are the leader's matter, the next epoch starts the engine."""

    def died(self, now: float) -> float | None:
        super().died(now)
        return 0.0

    def words(self, delay: float) -> str:
        return "the next epoch starts it"
