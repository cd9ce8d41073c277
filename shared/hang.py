"""Who hangs: lives, but gives no sign of life or no token. Pure; what follows is the coordinator's.

Time is counted in looks of at most LOOK_SECONDS each, so who looks accuses nobody of a pause of its own.
"""

from collections.abc import Iterable

LOOK_SECONDS = 1.5
"""The coordinator looks every second, supervisord's plugin too."""
SIDE_SECONDS = 15.0
"""A side process silent for so long is killed. None of them ever computes; supervisord starts a new one."""


class Hangs:
    """``engine_seconds``: how long an engine may be stuck before it is killed; 0: for ever."""

    def __init__(self, engine_seconds: float) -> None:
        self._engine_seconds = engine_seconds
        self._stuck: dict[str, float] = {}
        self._looked: float | None = None

    def look(self, now: float, *, engine_stuck: bool, silent: Iterable[str]) -> list[str]:
        """Names whose time is up, each once: "engine" or a side process. ``now``: monotonic seconds."""
        passed = 0.0 if self._looked is None else min(now - self._looked, LOOK_SECONDS)
        self._looked = now
        bounds = dict.fromkeys(silent, SIDE_SECONDS)
        if engine_stuck and self._engine_seconds:
            bounds["engine"] = self._engine_seconds
        self._stuck = {name: self._stuck.get(name, 0.0) + passed for name in bounds}
        due = [name for name, seconds in self._stuck.items() if seconds >= bounds[name]]
        for name in due:
            del self._stuck[name]
        return due

    def engine_left(self) -> float | None:
        """Seconds until a stuck engine is killed; None when it isn't stuck."""
        seconds = self._stuck.get("engine")
        return None if seconds is None else max(0.0, self._engine_seconds - seconds)
