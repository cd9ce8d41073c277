"""What agents may have in discovery, on disk: written before the first registration, read when its agent is dead.

A file a worker id. Its agent holds a lock on it, which the kernel takes back with the agent's life, however that ends.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from shared.config import REGISTRATIONS_DIR


class Registration(msgspec.Struct, frozen=True):
    """``store``: the directory of the file backend, empty with any other."""

    agent: str
    worker_id: int
    backend: str
    store: str = ""


def hold(runtime_dir: Path, registration: Registration) -> int:
    """Write it down for the life of this process; the descriptor that holds the lock. Raises OSError."""
    directory = runtime_dir / REGISTRATIONS_DIR
    directory.mkdir(mode=0o700, exist_ok=True)
    name = f"{registration.worker_id:x}"
    hidden = directory / f".{name}"  # without its lock it would read as a dead agent's
    descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        os.write(descriptor, msgspec.json.encode(registration))
    except OSError:
        hidden.unlink()
        raise
    hidden.rename(directory / name)
    return descriptor


def abandoned(runtime_dir: Path) -> Iterator[tuple[Path, Registration]]:
    """Those whose agents are dead. Remove the file when nothing of it is in discovery any more."""
    for path in sorted((runtime_dir / REGISTRATIONS_DIR).glob("[!.]*")):
        with contextlib.suppress(OSError, msgspec.MsgspecError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path, msgspec.json.decode(file.read(), type=Registration)
