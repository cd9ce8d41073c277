"""The node's status as text: one pure function from the status document, for `sgnode status` and `supervisorctl node`."""

import time
from collections.abc import Mapping
from typing import Any

HEADINGS = ("PROCESS", "PID", "STATE", "UPTIME", "RESTARTS", "RSS", "DETAIL")
NEWS_SECONDS = 86_400.0
"""An engine's death is shown for so long."""
FEW = 8
"""Of a larger group only the ranks that are not well are shown."""
QUIET_SECONDS = 2.0
LEAST_SECONDS = 0.05
"""A phase of the start-up that took less is not shown."""
PHASES = {"kv_cache": "KV cache", "warm_up": "warm-up", "children": "SGLang's processes"}
LEFT = {"PROCESS", "STATE", "DETAIL"}


def span(seconds: float) -> str:
    """A duration in seconds in at most two units: ``9s``, ``4m10s``, ``3h05m``, ``2d07h``."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def render(document: Mapping[str, Any], now: float | None = None) -> str:
    """The status document as a table, without a trailing newline. ``now``: UNIX seconds. Missing keys read as empty."""
    now = time.time() if now is None else now
    lines = [_headline(document, now)]
    if document.get("reason"):
        lines.append(f"  {document['reason']}")
    if document.get("waiting_for"):
        # A node that has not begun does nothing but wait.
        only = document.get("state") == "waiting" and not document.get("reason")
        lines.append(f"  {'' if only else 'waiting for '}{document['waiting_for']}")
    if document.get("logs"):
        lines.append(f"  {document['logs']}")
    lines.extend(group_lines(document))
    if document.get("stale_s"):
        lines.append(f"  as of {span(document['stale_s'])} ago: the coordinator is not reporting")
    lines.append("  " + "   ".join(fact_words(document)))
    lines.extend(startup_lines(document, now))
    lines.extend(crash_lines(document, now))
    lines.append("")
    lines.extend(columns([HEADINGS, *(cells(process) for process in document.get("processes", ()))]))
    return "\n".join(lines)


def _headline(document: Mapping[str, Any], now: float) -> str:
    since = document.get("since")
    age = f" for {span(now - since)}" if since else ""
    return f"node {document.get('name', '?')}: {document.get('state', '?')}{age}"


def fact_words(document: Mapping[str, Any]) -> list[str]:
    """Ports, identity, version."""
    ports = document.get("ports") or {}
    facts = [f"{name} port {port}" for name, port in ports.items() if port]
    facts.append(f"registered {'yes' if document.get('registered') else 'no'}")
    facts.append(f"in flight {document.get('inflight', 0)}")
    facts.append(f"incarnation {document.get('incarnation', 0)}")
    if document.get("epoch"):
        facts.append(f"epoch {document['epoch']}")
    facts.append(f"{document.get('role', '?')}, rank {document.get('node_rank', 0)}, sgnode {document.get('version', '?')}")
    return facts


def group_lines(document: Mapping[str, Any]) -> list[str]:
    """Who is there of a group, as its leader knows it; on the others, why agents and frontend are missing."""
    group = document.get("group")
    if not group:
        return []
    rank, nnodes = document.get("node_rank", 0), group["nnodes"]
    if rank:
        return [f"  rank {rank} of {nnodes}: no agent and no frontend here, rank 0 has them (the leader, {group['leader']})"]
    lines = [f"  {line}" for line in group["differences"]]
    for each in group["ranks"]:
        seen, refused, engine = each["seen_s"], each["refused"], each["engine"]
        words = "not seen yet" if seen is None else f"{each['host']}, engine {engine}, heard {span(seen)} ago"
        also = f"; {refused} says to be it too and is refused" if refused else ""
        if seen is None or seen > QUIET_SECONDS or engine != "ready" or refused or nnodes <= FEW:
            lines.append(f"  rank {each['node_rank']}: {words}{also}")
    return lines


def startup_lines(document: Mapping[str, Any], now: float) -> list[str]:
    """Where the seconds of the engine's start went, or go; none for one that was broken off."""
    startup = document.get("startup")
    if not startup or not (startup["done"] or startup["current"]):
        return []
    phases = [f"{PHASES.get(name, name)} {took:.1f}" for name, took in startup["phases"].items() if took >= LEAST_SECONDS]
    if startup["done"]:
        return [f"  start-up: {startup['seconds']:.1f} s = {', '.join(phases)}"]
    phases.append(f"{PHASES.get(startup['current'], startup['current'])} for {now - startup['since']:.1f} so far")
    return [f"  start-up: {now - startup['begun']:.1f} s so far = {', '.join(phases)}"]


def crash_lines(document: Mapping[str, Any], now: float) -> list[str]:
    """The engine's last death, while it is news, and the end of its log until the node is ready again."""
    crash, log = document.get("last_crash"), document.get("last_log") or ()
    lines = []
    if crash and (log or now - crash["at"] < NEWS_SECONDS):
        lines.append(f"  last crash {span(now - crash['at'])} ago: {crash['reason']}")
        lines.append(f"    bundle: {crash['path']}")
    if log:
        lines.append("  the end of the engine's log then:")
        lines.extend(f"    | {line}" for line in log)
    return lines


def cells(process: Mapping[str, Any]) -> tuple[str, ...]:
    """A process's row, by HEADINGS."""
    uptime, rss = process.get("uptime_s"), process.get("rss_mb")
    detail = process.get("detail") or ""
    if process.get("waiting_for"):
        detail = f"{detail}; " if detail else detail
        detail += f"waiting for {process['waiting_for']}"
    return (
        str(process.get("name", "?")),
        str(process.get("pid") or "-"),
        str(process.get("state", "?")),
        "-" if uptime is None else span(uptime),
        str(process.get("restarts") or 0),
        "-" if rss is None else f"{rss:.0f} MB",
        detail,
    )


def columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows, the headings first, as aligned lines."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    return [
        "  ".join(
            cell.ljust(width) if heading in LEFT else cell.rjust(width)
            for cell, width, heading in zip(row, widths, HEADINGS, strict=True)
        ).rstrip()
        for row in rows
    ]
