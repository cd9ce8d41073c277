"""The engine's process tree as /proc shows it: who is in it, who is essential, how one ended."""

import contextlib
import os
import signal
from pathlib import Path

ESSENTIAL = {
    "sglang::schedul": "scheduler",
    "sglang::detoken": "detokenizer",
    "sglang::data_pa": "data parallel controller",
    "sglang::tokeniz": "tokenizer worker",
    "sgl_diffusion::": "scheduler",
    "sgnode::child": "child",
}
"""Beginning of a title (15 bytes: what the kernel keeps of it in comm) -> who that is. Without any of them the engine is dead.

Titles of SGLang 0.5.16 and 0.5.23: ``sglang::scheduler_TP0``, ``sglang::detokenizer``, ``sglang::data_parallel_controller``; of
image and video workers ``sgl_diffusion::scheduler``.
"""

PF_EXITING = 0x4
"""Linux's include/linux/sched.h; in the ninth field of stat."""


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def children(pid: int) -> list[int]:
    """Direct children, of each of its threads."""
    found: list[int] = []
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for task in tasks:
        found.extend(int(child) for child in _read(pid, f"task/{task}/children").split())
    return found


def descendants(pid: int) -> list[int]:
    """All below a process, zombies too, parents before their children."""
    found: list[int] = []
    todo = children(pid)
    while todo:
        child = todo.pop(0)
        found.append(child)
        todo.extend(children(child))
    return found


def state(pid: int) -> str:
    """The state's letter as in proc(5); empty when there is no such process."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return fields[0] if fields else ""


def turns(pid: int) -> int:
    """How often its main thread has got and given back a core so far; 0 when there is no such process."""
    lines = _read(pid, "status").splitlines()
    return sum(int(line.split()[1]) for line in lines if "voluntary_ctxt_switches" in line)


def title(pid: int) -> str:
    """What the process calls itself; of a zombie only its first 15 bytes are left."""
    return _read(pid, "cmdline").replace("\0", " ").strip() or _read(pid, "comm").strip()


def essential(name: str) -> str | None:
    """Who a title stands for, if the engine can't live without it."""
    return next((who for start, who in ESSENTIAL.items() if name.startswith(start)), None)


def how(status: int) -> str:
    """A wait status in words."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(number).name}"
        return f"killed by signal {number}"
    return f"exited with code {os.waitstatus_to_exitcode(status)}"


def end_status(stat: str) -> int | None:
    """Wait status of a process that is dead or on its way (proc(5): the text of its stat), None while it lives.

    A killed process first gives back its memory and only then is a zombie, and its pidfd readable: 70 to 190 ms after SIGKILL for
    SGLang's on a CPU, 1.2 to 1.8 s with 60 GiB on an H100. The kernel marks it 0.2 ms after (benchmarks/gpu_memory.py).
    """
    fields = stat.rpartition(")")[2].split()
    ended = bool(fields) and (fields[0] in ("Z", "X") or int(fields[6]) & PF_EXITING)
    return int(fields[-1]) if ended else None


def status(pid: int) -> int | None:
    """``end_status`` of a pid; None also when there is no such process."""
    return end_status(_read(pid, "stat"))


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
