"""What a process may have: descriptors, locked memory, processes, core dumps. A running node's, else this shell's."""

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from procs.cli.doctor.finding import Finding, error, ok, warning
from procs.cli.doctor.subject import Subject

MINFDS = 4096
"""supervisor.conf: supervisord raises its soft limit to it, and refuses to start below."""
MINPROCS = 200
"""supervisord's default: the same."""
FILES = 16384
"""A stream is a connection in frontend, agent and engine's side each; SGLang itself wants 65,535 and takes what it gets."""
PROCESSES = 4096
"""Threads count: torch, NCCL and Dynamo's runtime have some hundred a process."""
CAP_IPC_LOCK = 14
UNLIMITED = resource.RLIM_INFINITY


@dataclass(frozen=True)
class Facts:
    """Soft and hard limits; -1 is none."""

    nofile: tuple[int, int]
    memlock: tuple[int, int]
    nproc: tuple[int, int]
    core: tuple[int, int]
    may_lock: bool = False
    """CAP_IPC_LOCK: no limit of locked memory counts."""
    is_root: bool = False
    """No limit of processes counts."""
    pids_max: int | None = None
    """Of the cgroup."""
    core_pattern: str = ""


def facts(pid: int) -> Facts:
    status = Path(f"/proc/{pid or 'self'}/status").read_text()
    capabilities = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")), 0)
    kinds = (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_NPROC, resource.RLIMIT_CORE)
    nofile, memlock, nproc, core = (resource.prlimit(pid or os.getpid(), kind) for kind in kinds)
    return Facts(
        nofile, memlock, nproc, core,
        may_lock=bool(capabilities >> CAP_IPC_LOCK & 1),
        is_root="Uid:\t0" in status,
        pids_max=lowest(cgroup(pid), "pids.max"),
        core_pattern=Path("/proc/sys/kernel/core_pattern").read_text().strip(),
    )  # fmt: skip


def cgroup(pid: int) -> Path | None:
    """A process's cgroup in the unified hierarchy; None without one."""
    for line in Path(f"/proc/{pid or 'self'}/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return Path("/sys/fs/cgroup" + line[3:])
    return None


def lowest(group: Path | None, name: str) -> int | None:
    """The tightest of a cgroup's limits, its parents' included; None without any."""
    found = []
    while group is not None and group != group.parent and group != Path("/sys/fs"):
        try:
            text = (group / name).read_text().strip()
            found += [int(text)] if text.isdigit() else []
        except OSError:
            pass
        group = group.parent
    return min(found, default=None)


def check(subject: Subject) -> Iterator[Finding]:
    try:
        found = facts(subject.supervisord)
    except PermissionError:
        yield ok("limits", "another user's node: not looked at")
        return
    pinned = not subject.on_cpu or subject.has("--enable-hierarchical-cache")
    yield from judge(found, pinned=pinned, gpus=not subject.on_cpu)


def judge(found: Facts, *, pinned: bool, gpus: bool) -> Iterator[Finding]:
    """``pinned``: the engine locks host memory."""
    soft, hard = found.nofile
    if _below(hard, MINFDS):
        yield error(
            "limits",
            f"open files: {hard} at most, supervisord needs {MINFDS}",
            "`ulimit -Hn 1048576`, or LimitNOFILE= in the unit",
        )
    elif _below(max(soft, MINFDS), FILES):
        yield warning(
            "limits",
            f"open files: {_words(soft)}, {_words(hard)} at most; each stream takes some",
            "`ulimit -n 1048576`, or LimitNOFILE= in the unit",
        )
    else:
        yield ok("limits", f"open files: {_words(soft)}, {_words(hard)} at most")
    locked = found.memlock[0]
    if not pinned or found.may_lock or locked == UNLIMITED:
        why = (
            "unlimited"
            if locked == UNLIMITED
            else "not limited (CAP_IPC_LOCK)"
            if found.may_lock
            else f"{locked >> 20} MiB, none is needed"
        )
        yield ok("limits", f"locked memory: {why}")
    else:
        yield warning(
            "limits",
            f"locked memory: {locked >> 20} MiB; RDMA and pinned host memory need more",
            "`ulimit -l unlimited`, or LimitMEMLOCK=infinity in the unit",
        )
    most = found.nproc[0] if not found.is_root else UNLIMITED
    if _below(found.nproc[1], MINPROCS):
        yield error("limits", f"processes: {found.nproc[1]} at most, supervisord needs {MINPROCS}", "`ulimit -Hu unlimited`")
    elif _below(most, PROCESSES):
        yield warning("limits", f"processes and threads: {most}", "`ulimit -u unlimited`")
    if found.pids_max is not None and found.pids_max < PROCESSES:
        yield warning(
            "limits",
            f"processes and threads of this cgroup: {found.pids_max}",
            "TasksMax=infinity, or `--pids-limit` of the container",
        )
    if gpus and found.core[0] != 0:
        size = "unlimited" if found.core[0] == UNLIMITED else f"up to {found.core[0] >> 20} MiB"
        words = f"core dumps: {size}, to {found.core_pattern}; an engine's may hold its restart up for minutes"
        yield warning("limits", words, "`ulimit -c 0`, or LimitCORE=0 in the unit")


def _below(limit: int, least: int) -> bool:
    return limit != UNLIMITED and limit < least


def _words(limit: int) -> str:
    return "unlimited" if limit == UNLIMITED else str(limit)
