"""One life of the engine on disk: its incarnation number and its temporary directory."""

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from shared import epoch
from shared.config import INCARNATION_FILE, RUNTIME_DIR_VARIABLE, TEMPORARY_DIR

INCARNATION_VARIABLE = "SGNODE_INCARNATION"
"""In the environment of the engine and all it starts, and of nothing else: the mark by which leftovers are found."""


@dataclass(frozen=True)
class Life:
    """``tmp`` is the engine's TMPDIR: SGLang leaves named files there (sockets, metrics) when it is killed."""

    incarnation: int
    epoch: int
    """The group's epoch that the coordinator starts it for; 0 without a group."""
    tmp: Path

    @property
    def metrics(self) -> Path:
        return self.tmp / "metrics"

    def environment(self, runtime_dir: Path) -> dict[str, str]:
        """What the engine gets beside the keeper's own environment."""
        return {
            RUNTIME_DIR_VARIABLE: str(runtime_dir),
            INCARNATION_VARIABLE: str(self.incarnation),
            "SGNODE_EPOCH": str(self.epoch),
            "TMPDIR": str(self.tmp),
            "PROMETHEUS_MULTIPROC_DIR": str(self.metrics),
            # setproctitle 1.3 writes titles over /proc/PID/environ unless told not to, and the mark would be gone.
            "SPT_NOENV": "1",
        }

    def end(self) -> None:
        """Remove the temporary directory."""
        shutil.rmtree(self.tmp, ignore_errors=True)


def begin(runtime_dir: Path) -> Life:
    """Take the next incarnation number and make its directories; those of earlier lives go. Raises OSError."""
    file = runtime_dir / INCARNATION_FILE
    last = 0
    with contextlib.suppress(FileNotFoundError, ValueError):
        last = int(file.read_text())
    incarnation = last + 1
    temporary = file.with_suffix(".tmp")
    temporary.write_text(f"{incarnation}\n")
    os.replace(temporary, file)
    root = runtime_dir / TEMPORARY_DIR
    if root.is_dir():
        for old in root.iterdir():
            if old.name.isdigit():
                shutil.rmtree(old, ignore_errors=True)
    life = Life(incarnation, epoch.load(runtime_dir).epoch, root / str(incarnation))
    life.metrics.mkdir(parents=True, mode=0o700)
    return life
