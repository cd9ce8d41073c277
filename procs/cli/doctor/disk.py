"""The runtime directory: may it be the node's, how long are its paths, and is there room for logs and crash bundles."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from procs.cli import runtime_dir
from procs.cli.doctor.finding import Finding, error, ok, warning
from procs.cli.doctor.subject import Subject
from shared.config import LOG_DIR, NodeConfig
from shared.errors import NodeError

LOG_BYTES = 4 * 20_000_000
"""Of one program: a log and three old ones (supervisor.conf)."""
BUNDLE_BYTES = 5 * 5_000_000
"""Crash bundles, the newest five."""
LEAST = 100_000_000
"""Below it the next bundle or rotation may fail."""


@dataclass(frozen=True)
class Room:
    """Of the file system that a path is on. Bytes."""

    path: Path
    free: int
    total: int
    inodes_free: int
    """-1: it doesn't count them."""
    kind: str
    writable: bool


def room(path: Path) -> Room:
    """Of the nearest directory that exists. Raises OSError."""
    there = next(each for each in (path, *path.parents) if each.exists())
    found = os.statvfs(there)
    mounts = [each for each in psutil.disk_partitions(all=True) if there.resolve().is_relative_to(each.mountpoint)]
    kind = max(mounts, key=lambda each: len(each.mountpoint)).fstype if mounts else "?"
    counts = found.f_favail if found.f_files else -1
    writable = not found.f_flag & os.ST_RDONLY and os.access(there, os.W_OK)
    return Room(there, found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize, counts, kind, writable)


def log_bytes(config: NodeConfig | None) -> int:
    """The most that a node's logs and bundles take."""
    agents = 1 if config is None else config.agents
    return (6 + agents) * LOG_BYTES + BUNDLE_BYTES


def check(subject: Subject) -> Iterator[Finding]:
    if subject.directory is None:
        return
    agents = subject.config.agent_names if subject.config else ["agent:0"]
    try:
        runtime_dir.check_length(subject.directory, ["coordinator", *agents])
        _usable(subject)
    except NodeError as refused:
        yield error("runtime directory", str(refused), "another --runtime-dir")
    else:
        mode = subject.directory.stat().st_mode & 0o777 if subject.directory.exists() else 0o700
        if mode & 0o077:
            yield warning(
                "runtime directory",
                f"{subject.directory} has mode {mode:04o}: others reach the node's sockets",
                f"`chmod 700 {subject.directory}`",
            )
        else:
            yield ok("runtime directory", str(subject.directory))
    places = {subject.directory, (subject.directory / LOG_DIR).resolve()}
    seen: set[int] = set()
    for place in sorted(places):
        found = room(place)
        device = found.path.stat().st_dev
        if device not in seen:
            seen.add(device)
            used = _size(subject.directory / LOG_DIR)
            yield from judge(found, max(0, log_bytes(subject.config) - used))


def _usable(subject: Subject) -> None:
    """Raises NodeError. A node that runs has its directory, whoever asks."""
    assert subject.directory is not None
    if subject.directory.exists() and not subject.running:
        runtime_dir.check_usable(subject.directory)


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) if directory.is_dir() else 0


def judge(found: Room, needed: int) -> Iterator[Finding]:
    """``needed``: what logs and bundles may still take."""
    where = f"{found.path} ({found.kind})"
    words = f"{where}: {found.free / 1e9:.2f} GB free of {found.total / 1e9:.2f}"
    if not found.writable:
        yield error("disk", f"{where} can't be written by this user", "another --runtime-dir, or `mount -o remount,rw`")
    elif found.free < LEAST or found.inodes_free == 0:
        full = words if found.inodes_free else f"{where}: no inode is left"
        yield error("disk", full, "make room: logs, crash bundles and sockets are there")
    elif found.free < needed:
        more = f"make room; logs and crash bundles take up to {needed / 1e9:.2f} GB more"
        yield warning("disk", words, more + (", and are host memory there" if found.kind == "tmpfs" else ""))
    else:
        yield ok("disk", f"{words}; logs and crash bundles take up to {needed / 1e9:.2f} more")
