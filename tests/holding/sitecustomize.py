"""Puts a fault into any Python process of a node that has this directory on its PYTHONPATH: HOLD stops its main thread, not it.

The process lives, its other threads go on, and its main thread does nothing while the file in SGNODE_TEST_HOLD exists: what a
deadlock looks like from outside. It says that it holds by a file of its own beside that one.
"""

import os
import signal
import time
from pathlib import Path

HOLD = signal.SIGRTMIN + 5


def _hold(_number: int, _frame: object) -> None:
    file = Path(os.environ["SGNODE_TEST_HOLD"])
    mark = file.with_name(f"{file.name}.{os.getpid()}")
    mark.touch()
    while file.exists():
        time.sleep(0.01)
    mark.unlink()


if "SGNODE_TEST_HOLD" in os.environ:
    signal.signal(HOLD, _hold)
