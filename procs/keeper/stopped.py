"""Who of the engine was stopped by a signal (SIGSTOP, a debugger): it takes no part, and its death is not seen by anyone."""

from collections.abc import Mapping

from procs.keeper import tree

STOPPED = ("T", "t")
"""proc(5): stopped by a signal, stopped by a tracer."""


class Stopped:
    """Looks at each scan. A profiler stops a process for milliseconds: only who is stopped in two looks in a row counts."""

    def __init__(self) -> None:
        self._before: set[int] = set()

    def look(self, processes: Mapping[int, str | None]) -> str:
        """``processes``: by pid, who each is (None: the engine can do without). Words on the first that is stopped, or none."""
        now = {pid for pid, who in processes.items() if who is not None and tree.state(pid) in STOPPED}
        both, self._before = sorted(now & self._before), now
        return f"{processes[both[0]]} (pid {both[0]}) is stopped by a signal or a debugger" if both else ""
