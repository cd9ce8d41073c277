"""A crash bundle: what a person needs who looks at an engine's death tomorrow, kept in the runtime directory's logs.

Bounded: at most KEPT bundles of at most about MOST_BYTES each. Written in a thread of its own, while the next engine starts.
"""

import contextlib
import json
import os
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from shared.config import LOG_DIR, NodeConfig

PREFIX = "crash-"
KEPT = 5
MOST_BYTES = 5_000_000
LOGS_BYTES = 4_000_000
"""Of that for the ends of the logs, divided equally among them."""
KERNEL_BYTES = 200_000
LAST_LINES = 15
LINE_LENGTH = 300
"""Of the engine's log in the node's status."""
PACKAGES = ("sglang", "torch", "ai-dynamo", "ai-dynamo-runtime", "transformers", "supervisor", "pyzmq", "msgspec")
HOST_FILES = ("/proc/meminfo", "/proc/loadavg", "/proc/pressure/memory", "/proc/driver/nvidia/version")
KERNEL_WORDS = ("out of memory", "oom", "killed process", "nvrm", "xid", "segfault", "hung_task", "blocked for more than", "mce:")


def place(directory: Path, incarnation: int, now: float) -> Path:
    """Where the bundle of this death goes: ``log/crash-20261123-031742-7`` (UTC, incarnation)."""
    return directory / LOG_DIR / f"{PREFIX}{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}-{incarnation}"


def write(target: Path, config: NodeConfig, crash: dict[str, Any], status: dict[str, Any]) -> None:
    """Write a bundle and remove the oldest ones; blocks. ``crash``: reason, at (UNIX seconds), incarnation. Raises OSError."""
    target.mkdir(mode=0o700, exist_ok=True)
    _json(target / "crash.json", {**crash, "versions": versions(config)})
    _json(target / "status.json", status)
    logs = sorted((config.path / LOG_DIR).glob("*.log"))
    for log in logs:
        with contextlib.suppress(OSError):
            (target / log.name).write_bytes(_tail(log, LOGS_BYTES // len(logs)))
    host = []
    for name in HOST_FILES:
        with contextlib.suppress(OSError):
            host.append(f"# {name}\n{Path(name).read_text()}")
    (target / "host.txt").write_text("\n".join(host))
    (target / "kernel.txt").write_text(_kernel())
    for old in sorted(target.parent.glob(f"{PREFIX}*"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def versions(config: NodeConfig) -> dict[str, str]:
    """Of what runs here, by package."""
    found = {"sgnode": config.version}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def last_lines(directory: Path) -> list[str]:
    """The end of the engine's log, without empty lines and a traceback's marks."""
    try:
        text = _tail(directory / LOG_DIR / "engine.log", LAST_LINES * 1000).decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip()[:LINE_LENGTH] for line in text.splitlines() if line.strip(" ^~")]
    return lines[-LAST_LINES:]


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _tail(path: Path, size: int) -> bytes:
    """The end of a file, from the beginning of a line."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - size))
        text = file.read(size)
    return text if end <= size else text.partition(b"\n")[2]


def _kernel() -> str:
    """What the kernel says of memory and GPUs; a reason instead where only root may read it."""
    try:
        buffer = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        return f"/dev/kmsg: {error.strerror} (dmesg as root has it)\n"
    lines: list[str] = []
    try:
        while True:
            try:
                record = os.read(buffer, 8192).decode(errors="replace")
            except BrokenPipeError:  # overwritten while we read: go on with the next
                continue
            if any(word in record.lower() for word in KERNEL_WORDS):
                lines.append(record.split("\n", 1)[0])
    except OSError:  # no more of them
        pass
    finally:
        os.close(buffer)
    return "\n".join(lines)[-KERNEL_BYTES:] + "\n"
