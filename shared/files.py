"""Small files of the runtime directory that must be written also when the disk is full."""

import contextlib
import os
from pathlib import Path


def rewrite(path: Path, data: bytes) -> None:
    """Replace a file atomically; without room for a second one, write into the blocks that it has.

    Raises OSError that names the file and what to do.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        try:
            with path.open("r+b", buffering=0) as file:
                if file.write(data) != len(data):
                    raise error
                file.truncate(len(data))
        except OSError:
            raise OSError(error.errno, f"{error.strerror}: {path} can't be written; make room there") from error
