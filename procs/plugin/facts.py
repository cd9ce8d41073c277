"""Merges what the coordinator last said with what supervisord knows about the processes now (pure, but for /proc)."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config import NodeConfig

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")

STATES = {
    "STOPPED": "stopped",
    "STARTING": "starting",
    "RUNNING": "ready",
    "BACKOFF": "starting",
    "STOPPING": "draining",
    "EXITED": "stopped",
    "FATAL": "failed",
    "UNKNOWN": "failed",
}
"""supervisord's states in the node's words, for processes that say nothing themselves (the frontend, or a dead one)."""

ALIVE = ("STARTING", "RUNNING", "STOPPING")
STALE_SECONDS = 5.0
"""The coordinator reports every second; without a word for so long its document is marked as old (``stale_s``)."""


@dataclass(frozen=True)
class ProcessFacts:
    """One process as supervisord sees it. ``pid`` 0: none. ``started`` in UNIX seconds, 0: never."""

    pid: int
    state: str
    started: float
    restarts: int
    problem: str


def empty_document(config: NodeConfig) -> dict[str, Any]:
    """The status before the coordinator's first word."""
    return {
        "name": config.name,
        "version": config.version,
        "role": config.role,
        "node_rank": config.node_rank,
        "state": "starting",
        "reason": "the coordinator has not reported yet",
        "since": time.time(),
        "waiting_for": "the coordinator",
        "registered": False,
        "epoch": 0,
        "incarnation": 0,
        "inflight": 0,
        "ports": {"http": config.http_port if config.frontend else None, "system": config.system_port},
        "processes": [],
    }


def rss_mb(pid: int) -> float | None:
    """Resident memory in MB (10^6 bytes); None when the process is gone."""
    try:
        return round(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES / 1e6, 1)
    except (OSError, IndexError, ValueError):
        return None


def uptime(pid: int) -> float | None:
    """Seconds since a process was started; None when it is gone."""
    try:
        started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) / TICKS
    except (OSError, IndexError, ValueError):
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def merge(document: dict[str, Any], age: float | None, processes: dict[str, ProcessFacts], stopping: bool) -> dict[str, Any]:
    """The status document. ``processes`` by program name; supervisord's ``engine`` is the keeper.

    ``age``: seconds since the coordinator's word, None before its first.
    """
    result = {**document, "supervisord_pid": os.getpid()}
    if age is not None and age > STALE_SECONDS:
        result["stale_s"] = round(age)
    if stopping and result.get("state") not in ("stopped", "failed"):
        result["state"] = "draining"
        result["reason"] = result.get("reason") if document.get("state") == "draining" else "the node is stopping"
    result["processes"] = _rows(document.get("processes", []), processes)
    return result


def _rows(said: list[dict[str, Any]], processes: dict[str, ProcessFacts]) -> list[dict[str, Any]]:
    known = {("keeper" if name == "engine" else name): facts for name, facts in processes.items()}
    rows = [dict(row) for row in said if row["name"] in known or row["name"] == "engine"]
    names = {row["name"] for row in rows}
    rows += [{"name": name, "pid": None, "state": "", "detail": "", "waiting_for": ""} for name in known if name not in names]
    for row in rows:
        if row["name"] == "engine":
            _complete_engine(row, known.get("keeper"))
        else:
            _complete(row, known[row["name"]])
    return rows


def _complete(row: dict[str, Any], facts: ProcessFacts) -> None:
    spoke = row["pid"] == facts.pid and bool(row["state"])
    if facts.state not in ALIVE or not spoke:
        # What it said belongs to a life that is over, or it never speaks.
        row["state"], row["waiting_for"] = STATES.get(facts.state, "failed"), ""
        row["detail"] = facts.problem if facts.state not in ALIVE else ""
    row["pid"] = facts.pid or None
    row["supervisor"] = facts.state
    row["uptime_s"] = round(time.time() - facts.started, 1) if facts.pid and facts.started else None
    row["restarts"] = facts.restarts
    row["rss_mb"] = rss_mb(facts.pid) if facts.pid else None


def _complete_engine(row: dict[str, Any], keeper: ProcessFacts | None) -> None:
    """The engine itself is the keeper's child: supervisord doesn't know its pid."""
    alive = keeper is not None and keeper.state in ALIVE
    age = uptime(row["pid"]) if row["pid"] and alive else None
    if age is None:
        row["pid"] = None
        if not alive:
            row["state"], row["waiting_for"] = ("stopped" if keeper is None else STATES[keeper.state]), ""
    row["supervisor"] = keeper.state if keeper else ""
    row["uptime_s"] = None if age is None else round(age, 1)
    row["restarts"] = keeper.restarts if keeper else 0
    row["rss_mb"] = None if age is None else rss_mb(row["pid"])
