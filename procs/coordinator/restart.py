"""When a dead engine may start again: exponential back-off, and an end to a crash loop (pure: the clock is an argument)."""

from collections import deque

BACKOFF_FIRST_SECONDS = 1.0
BACKOFF_MOST_SECONDS = 60.0
CALM_SECONDS = 300.0
"""An engine that was ready for so long had a good life: its death starts the back-off anew."""
LOOP_DEATHS = 5
LOOP_SECONDS = 600.0
"""So many deaths within so many seconds are a crash loop: a person has to look."""


class RestartPolicy:
    """Counts deaths. All times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._deaths: deque[float] = deque()
        self._backoff = BACKOFF_FIRST_SECONDS
        self._ready_since: float | None = None

    def ready(self, now: float) -> None:
        """The engine is ready (say it as often as it is)."""
        if self._ready_since is None:
            self._ready_since = now

    def died(self, now: float) -> float | None:
        """The engine died: seconds to wait before its next start, or None when it must not start again by itself."""
        if self._ready_since is not None and now - self._ready_since >= CALM_SECONDS:
            self._backoff = BACKOFF_FIRST_SECONDS
        self._ready_since = None
        self._deaths.append(now)
        while now - self._deaths[0] > LOOP_SECONDS:
            self._deaths.popleft()
        if len(self._deaths) >= LOOP_DEATHS:
            return None
        delay = self._backoff
        self._backoff = min(2 * delay, BACKOFF_MOST_SECONDS)
        return delay

    def reset(self) -> None:
        """A person started the engine: nothing that was before counts."""
        self.__init__()  # type: ignore[misc]
