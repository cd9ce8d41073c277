"""File systems that are full: a small tmpfs of the test's own, filled to its last byte."""

import contextlib
import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def tmpfs(path: Path, size: str) -> Iterator[Path]:
    """``path``, which must exist, as a tmpfs of that size (mount(8)'s ``size=``). Needs root."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "sgnode-test", str(path)], check=True)
    try:
        yield path
    finally:
        # Lazily: a node that is just being killed may have files in it.
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> Path:
    """Take all the room, or what has become free since, and prove it. The file to remove."""
    filler = path / "filler"
    with filler.open("ab", buffering=0) as file:
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * size)
    try:
        with (path / "probe").open("wb", buffering=0) as probe:
            probe.write(b"x")
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
    else:
        raise AssertionError(f"{path} is not full")
    finally:
        (path / "probe").unlink(missing_ok=True)
    return filler
