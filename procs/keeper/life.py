"""One life of the engine on disk: its incarnation number and its temporary directory."""

import contextlib
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from shared import epoch, files
from shared.config import INCARNATION_FILE, RUNTIME_DIR_VARIABLE, TEMPORARY_DIR

INCARNATION_VARIABLE = "SGNODE_INCARNATION"
"""In the environment of the engine and all it starts, and of nothing else: the mark by which leftovers are found."""
SHM_MARK_VARIABLE = "SGNODE_SHM_MARK"
"""Part of the name of all that this engine makes in shared memory, and of nothing else's (procs/engine/adapter/shm.py)."""
SHM_MARK_FILE = "shm-mark"
SHARED_PLACES = (Path("/dev/shm"), Path("/tmp"))
"""Where SGLang and Python leave named things whatever TMPDIR says."""


@dataclass(frozen=True)
class Life:
    """``tmp`` is the engine's TMPDIR: SGLang leaves named files there (sockets, metrics) when it is killed."""

    incarnation: int
    epoch: int
    """The group's epoch that the coordinator starts it for; 0 without a group."""
    tmp: Path
    shm_mark: str

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
            SHM_MARK_VARIABLE: self.shm_mark,
            "PROMETHEUS_MULTIPROC_DIR": str(self.metrics),
            # setproctitle 1.3 writes titles over /proc/PID/environ unless told not to, and the mark would be gone.
            "SPT_NOENV": "1",
        }

    def end(self) -> None:
        """Remove the temporary directory, and what a killed engine left in shared memory."""
        _remove(self.tmp)


def begin(runtime_dir: Path) -> Life:
    """Take the next incarnation number and make its directories; those of earlier lives go. Raises OSError."""
    file = runtime_dir / INCARNATION_FILE
    last = 0
    with contextlib.suppress(FileNotFoundError, ValueError):
        last = int(file.read_text())
    incarnation = last + 1
    files.rewrite(file, f"{incarnation}\n".encode())
    root = runtime_dir / TEMPORARY_DIR
    if root.is_dir():
        for old in root.iterdir():
            if old.name.isdigit():
                _remove(old)
    # Of this life alone: nodes in other containers may share /dev/shm, and have the same runtime directory.
    life = Life(incarnation, epoch.load(runtime_dir).epoch, root / str(incarnation), f"sgnode-{uuid.uuid4().hex[:16]}")
    life.metrics.mkdir(parents=True, mode=0o700)
    with contextlib.suppress(OSError):  # a full disk: what it leaves stays, but it runs
        (life.tmp / SHM_MARK_FILE).write_text(life.shm_mark)
    return life


def _remove(tmp: Path) -> None:
    """Of one life whose processes are gone."""
    mark = ""
    with contextlib.suppress(OSError):
        mark = (tmp / SHM_MARK_FILE).read_text()
    for place in SHARED_PLACES if mark.startswith("sgnode-") else ():
        # SGLang's diffusion allows no dash in its names.
        for left in place.glob(f"*{mark.replace('-', '[-_]')}*"):
            with contextlib.suppress(OSError):
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left)
                else:
                    left.unlink()
    shutil.rmtree(tmp, ignore_errors=True)
