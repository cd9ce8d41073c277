"""prctl(2): a process that goes when its parent does, and one that its orphaned descendants become children of."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, argument, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")


def signal_at_parents_death(number: signal.Signals) -> None:
    """Get this signal when the parent thread ends; it holds across exec. The parent may be gone already: compare getppid."""
    _prctl(PR_SET_PDEATHSIG, number)


def become_subreaper() -> None:
    """Orphans below this process become its children, so that it can wait for all. Raises OSError."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
