"""What a SIGKILLed keeper left running: found by the mark in its environment, killed before a new engine starts."""

import contextlib
import logging
import os
import select
import signal
import time
from pathlib import Path

from procs.keeper.cgroup import Cgroup
from procs.keeper.life import INCARNATION_VARIABLE
from shared.config import RUNTIME_DIR_VARIABLE

WAIT_SECONDS = 30.0
"""A killed process that still holds a GPU after so long will not be gone soon: starting beside it would only fail later."""


def find(runtime_dir: Path) -> list[int]:
    """Processes of an earlier engine of this runtime directory. This process's own environment has no incarnation."""
    directory = f"{RUNTIME_DIR_VARIABLE}={runtime_dir}".encode()
    mark = f"{INCARNATION_VARIABLE}=".encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            variables = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if directory in variables and any(variable.startswith(mark) for variable in variables):
            found.append(int(name))
    return found


def clear(runtime_dir: Path, cgroup: Cgroup | None) -> int:
    """Kill them and wait until they are gone; how many there were. Raises TimeoutError after WAIT_SECONDS."""
    deadline = time.monotonic() + WAIT_SECONDS
    killed: set[int] = set()
    while True:
        if cgroup is not None and not cgroup.empty:
            cgroup.kill()
        pids = find(runtime_dir)
        if not pids and (cgroup is None or cgroup.empty):
            break
        fds = []
        for pid in pids:
            with contextlib.suppress(OSError):
                fds.append(os.pidfd_open(pid))
                signal.pidfd_send_signal(fds[-1], signal.SIGKILL)
        killed.update(pids)
        poller = select.poll()
        for fd in fds:
            poller.register(fd, select.POLLIN)
        poller.poll(100)
        for fd in fds:
            os.close(fd)
        if time.monotonic() > deadline:
            raise TimeoutError(f"an earlier engine's processes can't be killed: {pids}")
    if killed:
        logging.warning("killed %d processes that an earlier engine left: %s", len(killed), sorted(killed))
    return len(killed)
