"""Memory: the host's, the cgroup's, the GPUs' against the weights; shared memory; strict overcommit."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from procs.cli.doctor import gpu, limits, model
from procs.cli.doctor.finding import Finding, error, ok, warning
from procs.cli.doctor.subject import Subject

GIB = 1 << 30
SHM = Path("/dev/shm")
SHM_LEAST = 64 << 20
"""A container's default: NCCL's buffers between the GPUs of one host do not fit (several MB a pair of GPUs)."""
SHM_GOOD = GIB
A_RANK = 4 * GIB
"""Host memory of one scheduler with CUDA and torch in it; its weights are mapped, and go through the page cache."""


@dataclass(frozen=True)
class Facts:
    """Bytes."""

    available: int
    limit: int | None = None
    """Of the cgroup, less what it has already."""
    swap_used: int = 0
    swap_total: int = 0
    overcommit: str = "0"
    """vm.overcommit_memory."""


def facts(pid: int) -> Facts:
    group = limits.cgroup(pid)
    limit = limits.lowest(group, "memory.max")
    try:
        used = int((group / "memory.current").read_text()) if group and limit is not None else 0
    except OSError:
        used = 0
    swap = psutil.swap_memory()
    return Facts(
        psutil.virtual_memory().available,
        None if limit is None else max(0, limit - used),
        swap.used,
        swap.total,
        Path("/proc/sys/vm/overcommit_memory").read_text().strip(),
    )


def check(subject: Subject) -> Iterator[Finding]:
    shm = shutil.disk_usage(SHM) if SHM.is_dir() else None
    found = facts(subject.supervisord)
    yield from host(found, loaded=subject.running, gpus=not subject.on_cpu)
    ranks = 0 if subject.config is None or subject.synthetic else len(gpu.ordinals(subject))
    yield from shared(None if shm is None else (shm.total, shm.free), ranks)
    if subject.config is None or subject.synthetic or subject.running:
        return  # what is loaded fitted
    directory = model.place(subject)
    found_weights = (
        model.weights(directory) if directory is not None and subject.flag("--load-format") != "dummy" else model.Weights()
    )
    on_host = subject.number("--hicache-size", 0) * 10**9 * ranks
    yield from against_host(found, found_weights, ranks, on_cpu=subject.on_cpu, hicache=on_host)
    if not subject.on_cpu:
        config = subject.config
        smaller = any(subject.has(flag) for flag in ("--quantization", "--cpu-offload-gb", "--torchao-config", "--load-format"))
        yield from against_gpu(gpu.smallest_mib(subject), found_weights.bytes, config.tp_size * config.pp_size, changed=smaller)


def host(found: Facts, *, loaded: bool, gpus: bool) -> Iterator[Finding]:
    free = min(found.available, found.limit if found.limit is not None else found.available)
    words = f"{found.available / GIB:.1f} GiB available" + (
        f", {found.limit / GIB:.1f} in this cgroup" if found.limit is not None else ""
    )
    if free < GIB:
        yield error(
            "memory", words, "end something, or a larger MemoryMax= or container: the kernel kills the largest process next"
        )
    else:
        yield ok("memory", words)
    if found.swap_total and found.swap_used > found.swap_total // 2 and loaded:
        yield warning(
            "memory",
            f"{found.swap_used / GIB:.1f} GiB of swap is in use",
            "see what was swapped out: a node that swaps misses its deadlines",
        )
    if gpus and found.overcommit == "2":
        yield warning("memory", "vm.overcommit_memory=2: CUDA reserves more than there is", "`sysctl vm.overcommit_memory=0`")


def shared(shm: tuple[int, int] | None, ranks: int) -> Iterator[Finding]:
    """``shm``: total and free bytes of /dev/shm; ``ranks``: schedulers on this node."""
    if shm is None:
        yield error("shared memory", f"{SHM} is missing", f"`mount -t tmpfs tmpfs {SHM}`")
        return
    total, free = shm
    words = f"{SHM}: {free / GIB:.2f} GiB free of {total / GIB:.2f}"
    larger = f"`mount -o remount,size=8G {SHM}`, `--shm-size 8g` of the container; leftovers of dead engines below"
    if free < SHM_LEAST // 2 or (free <= SHM_LEAST and ranks > 1):
        yield error("shared memory", words, larger)
    elif free < SHM_GOOD:
        yield warning("shared memory", words, larger)
    else:
        yield ok("shared memory", words)


def against_host(found: Facts, weights: model.Weights, ranks: int, *, on_cpu: bool, hicache: int) -> Iterator[Finding]:
    free = min(found.available, found.limit if found.limit is not None else found.available)
    if on_cpu:
        if weights.bytes > free:
            words = f"{weights.bytes / GIB:.1f} GiB of weights, {free / GIB:.1f} GiB of memory for them"
            yield error("memory", words, "a smaller model, or a larger host")
        return
    needed = ranks * A_RANK + hicache
    if hicache and needed > free:
        yield error(
            "memory",
            f"--hicache-size takes {hicache / GIB:.0f} GiB, {free / GIB:.1f} GiB are there",
            "a smaller --hicache-size (it is GB a rank)",
        )
    elif needed > free:
        words = (
            f"schedulers on this node: {ranks}; while they load they need some {needed / GIB:.0f} GiB, {free / GIB:.1f} are there"
        )
        yield warning("memory", words, "end something, or a larger MemoryMax= or container")


def against_gpu(smallest_mib: int | None, weights: int, parts: int, *, changed: bool) -> Iterator[Finding]:
    """``changed``: a flag makes the weights another size than their files."""
    if smallest_mib is None or not weights:
        return
    each, has = weights / parts / GIB, smallest_mib / 1024
    words = f"{each:.1f} GiB of weights a GPU, which has {has:.1f}"
    if each < has * 0.9:
        yield ok("gpu memory", words)
    elif changed:
        yield warning(
            "gpu memory",
            f"{words}, before quantisation or offloading",
            "see whether it fits; else a larger --tp-size or --pp-size",
        )
    else:
        yield error("gpu memory", words, "a larger --tp-size or --pp-size, or --quantization")
