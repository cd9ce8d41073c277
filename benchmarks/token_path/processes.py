"""The processes of a side: found by parentage and a mark in their environment, what each has used, and their end."""

import contextlib
import os
import re
import signal
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "SGNODE_BENCHMARK_SIDE"
"""Environment variable that every process of a side has; a node passes on what begins with SGNODE_."""
KEEP_MARK = {"SPT_NOENV": "1"}
"""setproctitle would write titles over the environment in /proc."""
TITLE = re.compile(r"(?:sglang|sgnode)::([a-z]+)", re.IGNORECASE)
MODULES = {
    "benchmarks.token_path.engine": "engine",
    "dynamo.frontend": "frontend",
    "dynamo.sglang": "dynamo worker",
    "supervisor.supervisord": "supervisord",
}
"""Names of what runs as ``python -m``; ``procs.NAME`` is NAME."""


@dataclass(frozen=True)
class Used:
    """Of one process so far."""

    name: str
    cpu: float
    """CPU seconds, user and system."""
    peak_rss: int
    """Bytes (VmHWM)."""


Snapshot = dict[tuple[int, float], Used]
"""By pid and start time."""


def name_of(command: list[str]) -> str:
    """What a process is, by its title or its command line."""
    if not command:
        return "?"
    if " " in command[0]:
        command = command[0].split()  # a title; one that setproctitle gave back may have lost its end
    if found := TITLE.match(command[0]):
        return found[1].lower()
    if "-m" in command[:-1]:
        module, rest = command[(at := command.index("-m") + 1)], command[at + 1 :]
        if module.startswith("procs."):
            name = module.split(".")[1]
            if len(name) > 2 and "engine".startswith(name):
                return "engine"
            return f"agent:{rest[0]}" if name == "agent" and rest else name
        return MODULES.get(module, module)
    if "-c" in command[:-1]:
        return "resource tracker" if "resource_tracker" in command[-1] else "helper"
    return Path(command[0]).name.partition(":")[0]


def marked(mark: str) -> list[psutil.Process]:
    """Living processes that carry the mark, and their descendants."""
    wanted = f"{MARK}={mark}".encode()
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if wanted in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                found[process.pid] = process
                found |= {child.pid: child for child in process.children(recursive=True)}
    return [process for process in found.values() if _alive(process)]


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def snapshot(mark: str) -> Snapshot:
    """What each process of the side has used."""
    found: Snapshot = {}
    for process in marked(mark):
        with contextlib.suppress(OSError, psutil.Error):
            cpu = process.cpu_times()
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024 if "VmHWM:" in status else 0
            used = Used(name_of(process.cmdline()), cpu.user + cpu.system, peak)
            found[process.pid, process.create_time()] = used
    return found


def cpu_between(before: Snapshot, after: Snapshot) -> dict[str, float]:
    """CPU seconds by name; a process that began in between counts whole, one that ended does not count."""
    spent: dict[str, float] = defaultdict(float)
    for key, used in after.items():
        spent[used.name] += used.cpu - (before[key].cpu if key in before else 0.0)
    return {name: round(seconds, 3) for name, seconds in sorted(spent.items())}


def peak_rss(found: Snapshot) -> dict[str, float]:
    """MiB by name, added up where several have one name (shared pages count in each)."""
    peaks: dict[str, float] = defaultdict(float)
    for used in found.values():
        peaks[used.name] += used.peak_rss / 2**20
    return {name: round(size, 1) for name, size in sorted(peaks.items())}


def end(mark: str, seconds: float = 30.0) -> None:
    """Kill every process of the side and see it gone. Raises TimeoutError naming what stays."""
    until = time.monotonic() + seconds
    while left := marked(mark):
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        if time.monotonic() > until:
            raise TimeoutError(f"still there after {seconds:g} s: {left}")
        time.sleep(0.02)
