"""One load on a side that is up: its figures, with what each process of the side and the clients used for it."""

import time
from typing import Any

from benchmarks.token_path import processes
from benchmarks.token_path.drive import Done
from benchmarks.token_path.figures import figures
from benchmarks.token_path.load import Load
from benchmarks.token_path.side import Side

AROUND = ("frontend",)
"""Not of the worker itself, whichever side it is."""


def name_of(load: Load) -> str:
    """What was sent, as tables and plots name it."""
    return f"{load.rate:g} requests/s" if load.rate else f"{load.streams} streams"


def measure(side: Side, mark: str, load: Load) -> dict[str, Any]:
    """Send the load. Raises LoadError."""
    before: list[processes.Snapshot] = []
    done = side.run(load, lambda: before.append(processes.snapshot(mark)))
    after = processes.snapshot(mark)
    return {"load": name_of(load), "streams": load.streams, "rate": load.rate, **summary(done, before[0], after)}


def summary(done: list[Done], before: processes.Snapshot, after: processes.Snapshot) -> dict[str, Any]:
    """Figures of the requests, CPU by process in ms per 1,000 tokens, and how busy the clients were."""
    found = figures([request for part in done for request in part.requests])
    tokens = found["tokens"] or 1
    cpu = processes.cpu_between(before, after)
    worker = sum(seconds for name, seconds in cpu.items() if name not in AROUND)
    return {
        **found,
        "cpu_ms_per_1000": round(sum(cpu.values()) / tokens * 1e6, 3),
        "cpu_ms_per_1000_by_process": {name: round(seconds / tokens * 1e6, 3) for name, seconds in cpu.items()},
        "tokens_per_core_s": round(tokens / worker, 1) if worker else None,
        "clients": len(done),
        "clients_cpu_s": round(sum(part.cpu for part in done), 3),
        "clients_busiest": round(max(part.cpu / part.wall for part in done), 3),
        "peak_rss_mib": processes.peak_rss(after),
        "at": round(time.time(), 3),
    }
