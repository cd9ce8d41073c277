"""Starting the engine: forked while the keeper has one thread, tied to the keeper's life, in its own session and cgroup."""

import ctypes
import os
import signal
from collections.abc import Mapping, Sequence

from procs.keeper.cgroup import Cgroup

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
"""prctl(2)."""

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, argument, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")


def become_subreaper() -> None:
    """Orphans of the engine's tree become this process's children, so that it can wait for all. Raises OSError."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def start(command: Sequence[str], environment: Mapping[str, str], cgroup: Cgroup | None) -> int:
    """Start the engine; its pid. SIGKILLed when this process dies. Call it before any thread exists. Raises OSError."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        # Its own session: killpg reaches what stays in it, and the terminal's ^C doesn't.
        os.setsid()
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the keeper died before the prctl
            os._exit(1)
        if cgroup is not None:
            try:
                cgroup.enter()
            except OSError as error:
                os.write(2, f"keeper: no cgroup for the engine, killing by process tree instead: {error}\n".encode())
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execvpe(command[0], list(command), dict(environment))
    except BaseException as error:
        os.write(2, f"keeper: can't start the engine: {error}\n".encode())
    finally:
        os._exit(127)
