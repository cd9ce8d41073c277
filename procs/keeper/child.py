"""Starting the engine: forked while the keeper has one thread, tied to the keeper's life, in its own session and cgroup."""

import os
import signal
from collections.abc import Mapping, Sequence

from procs.keeper.cgroup import Cgroup
from shared.prctl import signal_at_parents_death


def start(command: Sequence[str], environment: Mapping[str, str], cgroup: Cgroup | None) -> int:
    """Start the engine; its pid. SIGKILLed when this process dies. Call it before any thread exists. Raises OSError."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        # Its own session: killpg reaches what stays in it, and the terminal's ^C doesn't.
        os.setsid()
        signal_at_parents_death(signal.SIGKILL)
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
