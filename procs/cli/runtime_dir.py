"""The runtime directory of a node: where it is, whose it is, that only one node runs in it, and how a running one is found."""

import contextlib
import fcntl
import os
import stat
from pathlib import Path

from shared import sockets
from shared.config import DISCOVERY_DIR, LOCK_FILE, LOG_DIR, SOCKET_DIR, TEMPORARY_DIR
from shared.errors import NodeError

SGLANG_IPC = "tmpXXXXXXXX"
"""SGLang 0.5.23 names its ipc sockets by tempfile in TMPDIR."""


def bases() -> list[Path]:
    """Where runtime directories are by default, most specific last; the first that is writable is used."""
    found = [Path("/run/sgnode")]
    if "XDG_RUNTIME_DIR" in os.environ:
        found.append(Path(os.environ["XDG_RUNTIME_DIR"]) / "sgnode")
    found.append(Path(f"/tmp/sgnode-{os.geteuid()}"))
    return found


def default(name: str) -> Path:
    """The runtime directory of a node of that name."""
    for base in bases():
        target = base if base.exists() else base.parent
        if os.access(target, os.W_OK) and (base != Path("/run/sgnode") or os.geteuid() == 0 or base.exists()):
            return base / name
    return bases()[-1] / name


def check_length(directory: Path, names: list[str]) -> None:
    """Raises NodeError when a socket in the directory would have too long a path."""
    for name in (*names, sockets.REQUESTS, sockets.METRICS):
        sockets.address(directory, name)
    longest = directory / TEMPORARY_DIR / "999999" / SGLANG_IPC
    if len(str(longest).encode()) > sockets.IPC_PATH_LIMIT:
        raise NodeError(f"--runtime-dir: too long for SGLang's sockets ({sockets.IPC_PATH_LIMIT} bytes at most): {longest}")


def claim(directory: Path, name: str) -> int:
    """Make the directory this node's: 0700, owned, locked. Returns the locked descriptor, which the node keeps open.

    Raises NodeError, having written nothing, when it is another user's or another node runs in it.
    """
    made = not directory.exists()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise NodeError(f"--runtime-dir {directory}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise NodeError(f"--runtime-dir {directory}: not a directory of this user (uid {os.geteuid()}, owner {found.st_uid})")
    if found.st_mode & 0o077:
        directory.chmod(0o700)
    descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise NodeError(f"node {name!r} is running already in {directory}; see `sgnode status --name {name}`") from error
    if made:
        (directory / ".made").touch()
    return descriptor


def prepare(directory: Path) -> None:
    """The empty subdirectories; what an earlier node left (it was killed) goes, but for its logs."""
    import shutil

    for entry in directory.iterdir():
        if entry.name in (LOG_DIR, LOCK_FILE):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    for name in (LOG_DIR, SOCKET_DIR, TEMPORARY_DIR, DISCOVERY_DIR):
        (directory / name).mkdir(mode=0o700, exist_ok=True)


def abandon(directory: Path, descriptor: int) -> None:
    """Give back a claimed directory after a refusal: it is as it was before."""
    made = (directory / ".made").exists()
    with contextlib.suppress(OSError):
        (directory / ".made").unlink(missing_ok=True)
        (directory / LOCK_FILE).unlink(missing_ok=True)
        if made:
            directory.rmdir()
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
    found = [path for base in bases() if base.is_dir() for path in sorted(base.iterdir()) if running(path)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise NodeError("no node is running here; start one with `sgnode serve`, or name it with --name or --runtime-dir")
    names = ", ".join(path.name for path in found)
    raise NodeError(f"several nodes are running ({names}): choose one with --name")
