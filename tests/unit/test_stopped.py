"""Who counts as stopped: a real child under SIGSTOP, not one that a profiler stops now and then."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from procs.keeper.stopped import Stopped
from tests.harness import process_state, wait_for


@pytest.fixture
def child() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield process.pid
    process.kill()
    process.wait()


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    wait_for("stopped", lambda: process_state(pid) == "T")


def test_who_is_stopped_in_two_looks_is_named(child: int) -> None:
    still = Stopped()
    stop(child)
    assert still.look({child: "scheduler"}) == ""
    assert still.look({child: "scheduler"}) == f"scheduler (pid {child}) is stopped by a signal or a debugger"
    assert still.look({child: None}) == "", "the engine can do without it"
    os.kill(child, signal.SIGCONT)
    wait_for("running", lambda: process_state(child) != "T")
    assert still.look({child: "scheduler"}) == ""


def test_who_has_run_in_between_is_not(child: int) -> None:
    """What a profiler that samples does, seen in its stop by each look."""
    still = Stopped()
    for _ in range(5):
        stop(child)
        assert still.look({child: "scheduler"}) == ""
        os.kill(child, signal.SIGCONT)
        wait_for("running", lambda: process_state(child) != "T")
