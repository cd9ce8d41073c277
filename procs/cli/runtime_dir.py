"""The runtime directory of a node: where it is, whose it is, that only one node runs in it, and how a running one is found."""

import contextlib
import fcntl
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from shared import sockets
from shared.config import (
    ADAPTERS_FILE,
    CONFIG_FILE,
    DISCOVERY_DIR,
    EPOCH_FILE,
    INCARNATION_FILE,
    LOCK_FILE,
    LOG_DIR,
    LOG_LEVELS_FILE,
    REGISTRATIONS_DIR,
    SOCKET_DIR,
    SUPERVISOR_CONF,
    SUPERVISOR_SOCKET,
    TEMPORARY_DIR,
)
from shared.errors import NodeError

SUPERVISOR_BINDS = f"{SUPERVISOR_SOCKET}.4194304"
"""supervisor 4.3 binds its socket under a name with its pid, then renames it."""
SGLANG_IPC = f"{TEMPORARY_DIR}/999999/tmpXXXXXXXX"
"""SGLang 0.5.23 names its ipc sockets by tempfile in TMPDIR, which has the engine's incarnation in it."""
SUBDIRECTORIES = (LOG_DIR, SOCKET_DIR, TEMPORARY_DIR, DISCOVERY_DIR, REGISTRATIONS_DIR)
FILES = (
    LOCK_FILE, CONFIG_FILE, "node.tmp", SUPERVISOR_CONF, SUPERVISOR_SOCKET, "supervisord.pid", INCARNATION_FILE, EPOCH_FILE,
    ADAPTERS_FILE, LOG_LEVELS_FILE,
)  # fmt: skip
"""What else a node has in its directory; a suffix makes a temporary form."""


def bases() -> list[Path]:
    """Where runtime directories are by default; the first that this user can write to is used."""
    found = [Path("/run/sgnode")]
    if "XDG_RUNTIME_DIR" in os.environ:
        found.append(Path(os.environ["XDG_RUNTIME_DIR"]) / "sgnode")
    return [*found, Path(f"/tmp/sgnode-{os.geteuid()}")]


def default(name: str) -> Path:
    """The runtime directory of a node of that name."""
    for base in bases():
        if os.access(base if base.exists() else base.parent, os.W_OK):
            return base / name
    return bases()[-1] / name


def check_length(directory: Path, processes: list[str]) -> None:
    """Raises NodeError when a socket in the directory would have too long a path."""
    for name in (*processes, sockets.REQUESTS, sockets.METRICS):
        sockets.address(directory, name)
    for name in (SGLANG_IPC, SUPERVISOR_BINDS):
        length = len(str(directory / name).encode())
        if length > sockets.IPC_PATH_LIMIT:
            raise NodeError(
                f"--runtime-dir: {length} bytes for a socket's path, {sockets.IPC_PATH_LIMIT} at most: {directory / name}"
            )


@dataclass
class Claim:
    """A directory that is this node's. The node runs as long as the descriptor is open in some process."""

    directory: Path
    lock: int
    made: list[Path]
    """Directories that did not exist before, innermost first."""

    def abandon(self) -> None:
        """Give the directory back; it goes when this claim made it."""
        self._clear(keep=(LOG_DIR,))
        for path in (self.directory / LOG_DIR, *self.made):
            with contextlib.suppress(OSError):  # logs of an earlier node stay
                path.rmdir()
        os.close(self.lock)

    def prepare(self) -> None:
        """Make the subdirectories; what a node that was killed left behind goes, but for its logs and what it has in discovery.

        Raises OSError.
        """
        self._clear(keep=(LOG_DIR, LOCK_FILE, REGISTRATIONS_DIR))
        for name in SUBDIRECTORIES:
            (self.directory / name).mkdir(mode=0o700, exist_ok=True)

    def _clear(self, keep: tuple[str, ...]) -> None:
        for entry in self.directory.iterdir():
            if entry.name in keep:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def claim(directory: Path, name: str) -> Claim:
    """Make the directory this node's: owned, 0700, locked.

    Raises NodeError, having changed nothing, when it is another user's, has other files in it, or another node runs there.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        for path in reversed(made):
            path.mkdir(mode=0o700)
        check_usable(directory)
        lock = _lock(directory, name)
        directory.chmod(0o700)
    except BaseException as error:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            raise NodeError(f"--runtime-dir {directory}: {error.strerror}") from error
        raise
    return Claim(directory, lock, made)


def check_usable(directory: Path) -> None:
    """Raises NodeError when the directory, which exists, can't be a node's of this user."""
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NodeError(f"--runtime-dir {directory}: not a directory")
    if found.st_uid != os.geteuid():
        raise NodeError(f"--runtime-dir {directory}: belongs to user {found.st_uid}, not to this one ({os.geteuid()})")
    if directory.parent == bases()[-1]:
        # In /tmp anybody may have made it before us.
        parent = directory.parent.lstat()
        if not stat.S_ISDIR(parent.st_mode) or parent.st_uid != os.geteuid() or parent.st_mode & 0o022:
            raise NodeError(f"--runtime-dir: {directory.parent} is not this user's alone; name another place")
    # A node empties its directory when it starts and when it ends.
    foreign = sorted(entry.name for entry in directory.iterdir() if not _is_ours(entry.name))
    if foreign:
        raise NodeError(f"--runtime-dir {directory}: has files that are not a node's ({foreign[0]}); name a new or empty one")


def _is_ours(name: str) -> bool:
    return name in SUBDIRECTORIES or any(name == file or name.startswith(f"{file}.") for file in FILES)


def _lock(directory: Path, name: str) -> int:
    """The locked descriptor; the file has the pid of the process that becomes supervisord."""
    while True:
        descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.read(descriptor, 20).decode().strip()
            os.close(descriptor)
            raise NodeError(
                f"node {name!r} is running already (pid {pid or '?'}); see `sgnode status --runtime-dir {directory}`"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == (directory / LOCK_FILE).stat().st_ino:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                return descriptor
        # Its former holder removed the file between our open and our lock.
        os.close(descriptor)


def running(directory: Path) -> bool:
    """True when a node holds the directory's lock."""
    try:
        descriptor = os.open(directory / LOCK_FILE, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def find(name: str | None, directory: Path | None) -> Path:
    """The node meant by --name or --runtime-dir, or the only one that runs. Raises NodeError otherwise."""
    if directory is not None:
        return directory
    if name is not None:
        candidates = [base / name for base in bases()]
        return next((path for path in candidates if running(path)), default(name))
    found = []
    for base in bases():
        with contextlib.suppress(OSError):
            found += [path for path in sorted(base.iterdir()) if running(path)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise NodeError("no node is running here; start one with `sgnode serve`, or name it with --name or --runtime-dir")
    names = ", ".join(path.name for path in found)
    raise NodeError(f"several nodes are running ({names}): choose one with --name")
