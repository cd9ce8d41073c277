"""The engine's own cgroup (v2), where one can be made: one write kills everything in it, however it was started."""

import contextlib
import hashlib
import os
from pathlib import Path


def _own_directory() -> Path | None:
    """This process's cgroup in the unified hierarchy, wherever that is mounted; None without one."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    path = next((line[3:] for line in groups if line.startswith("0::")), None)
    # proc(5): "... root mount-point options [optional fields] - type source super-options"
    mount = next((line.split(" ")[4] for line in mounts if " - cgroup2 " in line), None)
    return None if path is None or mount is None else Path(mount + path)


class Cgroup:
    """A child of the keeper's own cgroup. Its name follows from the runtime directory, so that the next keeper finds it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def make(cls, runtime_dir: Path) -> "Cgroup | None":
        """Make it, or find a predecessor's. None where cgroup v2 is missing, older than Linux 5.14 or not ours to write."""
        own = _own_directory()
        if own is None:
            return None
        name = "sgnode-" + hashlib.sha256(str(runtime_dir).encode()).hexdigest()[:16]
        group = cls(own / name)
        try:
            group.path.mkdir(exist_ok=True)
            if os.access(group.path / "cgroup.kill", os.W_OK) and os.access(group.path / "cgroup.procs", os.W_OK):
                return group
        except OSError:
            return None
        group.remove()
        return None

    def enter(self) -> None:
        """Move the calling process into it. Raises OSError."""
        (self.path / "cgroup.procs").write_text("0")

    def kill(self) -> None:
        """SIGKILL everything in it, also what is being forked now."""
        with contextlib.suppress(OSError):
            (self.path / "cgroup.kill").write_text("1")

    @property
    def empty(self) -> bool:
        try:
            return "populated 0" in (self.path / "cgroup.events").read_text()
        except OSError:
            return True

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self.path.rmdir()
