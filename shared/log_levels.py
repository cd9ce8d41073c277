"""Log levels: from the environment at the start, from a file in the runtime directory while the node runs.

The file (``log-levels.json``, process name to level, "" for all) is looked at with each Beat: no socket, and the next life of a
process finds it as well. `sgnode log-level` writes it.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from shared import files
from shared.config import LOG_LEVELS_FILE, RUNTIME_DIR_VARIABLE
from shared.errors import NodeError

NAMES = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "off": logging.CRITICAL + 1,
}
"""Dynamo's names and Python's. Python has no trace."""
OURS, DYNAMOS = "SGNODE_LOG", "DYN_LOG"
ALL = ""
"""Key in the file of what is not named itself."""
CHATTY = ("httpx", "httpcore", "asyncio", "urllib3")
"""Libraries that log each request at INFO, or more at DEBUG: never below WARNING, unless a variable names them."""

on_change: Callable[[int], object] | None = None
"""Called when the level has changed at run time, from any thread: the engine passes it on to SGLang's other processes."""
_process = ""
_seen: tuple[int, int] | None = None


def start(process: str) -> None:
    """Set the levels of a process that begins."""
    global _process, _seen
    _process, _seen = process, None
    root, targets = parse(os.environ)
    for name in CHATTY:
        logging.getLogger(name).setLevel(max(root, logging.WARNING))
    for name, level in targets.items():
        logging.getLogger(name).setLevel(level)
    logging.getLogger().setLevel(root)
    follow()


def follow() -> None:
    """Take over what `sgnode log-level` has written since; twice a second, so one stat when there is nothing new."""
    global _seen  # noqa: PLW0603
    if not (directory := os.environ.get(RUNTIME_DIR_VARIABLE)) or not _process:
        return
    try:
        found = os.stat(f"{directory}/{LOG_LEVELS_FILE}")
        seen = (found.st_ino, found.st_mtime_ns)
    except OSError:
        return
    if seen == _seen:
        return
    _seen = seen
    written = read(Path(directory))
    name = next((key for key in (_process, _process.partition(":")[0], ALL) if key in written), None)
    level = parse(os.environ)[0] if name is None else NAMES.get(written[name], logging.INFO)
    root = logging.getLogger()
    if root.level != level:
        root.setLevel(level)
        root.log(max(level, logging.INFO), "log level: %s", logging.getLevelName(level))
        if on_change is not None:
            on_change(level)


def read(runtime_dir: Path) -> dict[str, str]:
    """What was set while the node runs, by process; {} when nothing was, or it can't be read."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode((runtime_dir / LOG_LEVELS_FILE).read_bytes(), type=dict[str, str])
    return {}


def write(runtime_dir: Path, levels: dict[str, str]) -> None:
    """Replace it atomically. Raises OSError."""
    files.rewrite(runtime_dir / LOG_LEVELS_FILE, msgspec.json.encode(levels))


def parse(environ: Mapping[str, str]) -> tuple[int, dict[str, int]]:
    """Root level and levels by logger: SGNODE_LOG, or else DYN_LOG (``info,sglang=debug``). What is not known is INFO."""
    root, targets = logging.INFO, {}
    for part in (environ.get(OURS) or environ.get(DYNAMOS) or "").split(","):
        target, equals, name = part.strip().rpartition("=")
        level = NAMES.get(name.strip().lower())
        if level is None:
            continue
        if equals:
            targets[target.strip()] = level
        else:
            root = level
    return root, targets


def check(environ: Mapping[str, str]) -> None:
    """Raises NodeError for a level of SGNODE_LOG that there is not. DYN_LOG is Dynamo's: what it doesn't know is info."""
    for part in filter(None, environ.get(OURS, "").split(",")):
        if (name := part.rpartition("=")[2].strip().lower()) not in NAMES:
            raise NodeError(f"{OURS}: expected one of {', '.join(NAMES)}, got {name!r}")
