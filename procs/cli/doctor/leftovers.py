"""What dead engines left behind: shared memory that nobody has, processes of a life that is over, temporary files."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from procs.cli.doctor.finding import Finding, ok, warning
from procs.cli.doctor.memory import SHM
from procs.cli.doctor.subject import Subject, named
from shared.config import INCARNATION_FILE, RUNTIME_DIR_VARIABLE, TEMPORARY_DIR

FAMILIES = ("sglang_", "sgl_shm_", "multi_tokenizer_args_", "psm_", "sem.mp-", "cuda.shm.", "nccl-")
"""Beginnings of names in /dev/shm: SGLang 0.5.23's, Python's multiprocessing's, CUDA's and NCCL's."""
MARK = "sgnode-"
"""In the names of what an engine of a node makes; its keeper removes them (procs/keeper/life.py)."""
MUCH_BYTES = 100 << 20
MANY = 10_000
INCARNATION_VARIABLE = "SGNODE_INCARNATION"
"""In the environment of an engine and all that it starts (procs/keeper/life.py)."""


@dataclass(frozen=True)
class File:
    path: Path
    size: int


def check(subject: Subject) -> Iterator[Finding]:
    if SHM.is_dir():
        yield shared_memory(unused(SHM, mapped(SHM)))
    if subject.directory is not None:
        yield from processes(subject)
        yield from temporary(subject)


def mapped(directory: Path) -> set[str]:
    """Names of the files there that some process has open or mapped, as far as this user may look."""
    names: set[str] = set()
    prefix = f"{directory}/"
    for pid in psutil.pids():
        try:
            lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
            names.update(line.rpartition(prefix)[2] for line in lines if prefix in line)
            targets = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
            names.update(target.removeprefix(prefix) for target in targets if target.startswith(prefix))
        except OSError:
            continue
    return names


def unused(directory: Path, used: set[str]) -> list[File]:
    """This user's files of engines that no process has: whose others are can't be known without looking into their processes."""
    found = []
    for entry in os.scandir(directory):
        try:
            stat = entry.stat(follow_symlinks=False)
        except OSError:
            continue
        ours = MARK in entry.name or entry.name.startswith(FAMILIES)
        if ours and entry.name not in used and stat.st_uid == os.geteuid():
            found.append(File(Path(entry.path), stat.st_blocks * 512))
    return found


def shared_memory(files: list[File]) -> Finding:
    size = sum(each.size for each in files)
    if not files:
        return ok("leftovers", f"none in {SHM}")
    words = f"{len(files)} files in {SHM} that no process has, {size / 1e6:.1f} MB (the first: {files[0].path.name})"
    if size < MUCH_BYTES and len(files) < MANY:
        return ok("leftovers", words)
    return warning("leftovers", words, "remove them, unless another container shares it")


def incarnation(directory: Path) -> str:
    """The engine's present life, as its keeper wrote it down; empty before the first."""
    try:
        return (directory / INCARNATION_FILE).read_text().strip()
    except OSError:
        return ""


def marked(directory: Path) -> Iterator[tuple[int, str]]:
    """Processes with the runtime directory's mark, and the incarnation that they belong to."""
    for process in psutil.process_iter():
        try:
            environ = process.environ()
            if environ.get(RUNTIME_DIR_VARIABLE) == str(directory) and process.status() != psutil.STATUS_ZOMBIE:
                yield process.pid, environ.get(INCARNATION_VARIABLE, "")
        except psutil.Error:
            continue


def processes(subject: Subject) -> Iterator[Finding]:
    """Of a node that is gone, or of an engine's earlier life."""
    assert subject.directory is not None
    found = list(marked(subject.directory))
    if not subject.running:
        stale = [pid for pid, _ in found if pid != os.getpid()]
        todo = "`sgnode serve` ends an engine's; kill the others"
    else:
        now = incarnation(subject.directory)
        stale = [pid for pid, life in found if life and life != now]
        todo = "the keeper kills them before the next start; kill them now if they hold a GPU"
    yield from stale_processes(stale, todo)


def stale_processes(pids: Iterable[int], todo: str) -> Iterator[Finding]:
    found = list(pids)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        yield warning("leftovers", f"of a life that is over: {', '.join(named(pid) for pid in found[:3])}{more}", todo)


def temporary(subject: Subject) -> Iterator[Finding]:
    """TMPDIR of engines' earlier lives: the keeper removes each with its engine."""
    assert subject.directory is not None
    now = incarnation(subject.directory) if subject.running else None
    root = subject.directory / TEMPORARY_DIR
    old = [path for path in root.iterdir() if path.name.isdigit() and path.name != now] if root.is_dir() else []
    if old and subject.running:
        yield warning(
            "leftovers",
            f"temporary files of earlier engines: {', '.join(sorted(path.name for path in old)[:3])} in {root}",
            "the next engine start removes them",
        )
