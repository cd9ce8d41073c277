"""Who of the engine was stopped by a signal (SIGSTOP, a debugger): it takes no part, and its death is not seen by anyone."""

from collections.abc import Mapping

from procs.keeper import tree

STOPPED = ("T", "t")
"""proc(5): stopped by a signal, stopped by a tracer."""


class Stopped:
    """Looks at each scan. A profiler stops a process again and again: only who has not run between two looks in a row counts."""

    def __init__(self) -> None:
        self._before: dict[int, int] = {}

    def look(self, processes: Mapping[int, str | None]) -> str:
        """``processes``: by pid, who each is (None: the engine can do without). Words on the first that is stopped, or none."""
        now = {pid: tree.turns(pid) for pid, who in processes.items() if who is not None and tree.state(pid) in STOPPED}
        still = sorted(pid for pid, turns in now.items() if self._before.get(pid) == turns)
        self._before = now
        return f"{processes[still[0]]} (pid {still[0]}) is stopped by a signal or a debugger" if still else ""
