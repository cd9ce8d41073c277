"""The run as text: medians with the lowest and highest over all loads alike, CPU and memory by process."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.token_path.record import groups

COLUMNS = {
    "tokens_per_s": "tok/s", "requests_per_s": "req/s", "ttft_p50": "TTFT p50", "ttft_p90": "p90", "ttft_p99": "p99",
    "itl_p50": "ITL p50", "itl_p90": "p90", "itl_p99": "p99", "tokens_per_chunk": "tok/chunk", "cpu_ms_per_1000": "CPU ms/1k",
    "clients_busiest": "client",
}  # fmt: skip
"""What is shown of a load; ITL between arrivals, times in ms, ``client`` the busiest client process's share of a core."""
RANGES = ("tokens_per_s", "ttft_p50", "itl_p50", "itl_p99")
"""Shown with their lowest and highest."""
NOTHING = "-"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def cell(values: Sequence[float | None], *, ranged: bool) -> str:
    """Median, and ``[lowest, highest]``; a dash for what the side does not show."""
    known = [value for value in values if value is not None]
    if not known:
        return NOTHING
    text = number(median(known))
    return f"{text} [{number(min(known))}, {number(max(known))}]" if ranged and len(known) > 1 else text


def aligned(rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell, the first one to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def render(loads: list[dict[str, Any]]) -> str:
    """Everything of a run."""
    texts = []
    for kind, sides in groups(loads):
        rows = [[kind, *COLUMNS.values()]]
        for side, same in sides:
            rows.append([side, *(cell([load[key] for load in same], ranged=key in RANGES) for key in COLUMNS)])
        texts.append(aligned(rows))
        texts.append(_by_process(f"CPU ms per 1,000 tokens, {kind}", sides, "cpu_ms_per_1000_by_process"))
    # Peaks only grow within a start: the last load of a side has them.
    last = {side: [same[-1]] for _, sides in groups(loads) for side, same in sides}
    texts.append(_by_process("peak RSS, MiB", list(last.items()), "peak_rss_mib"))
    return "\n\n".join(texts)


def _by_process(title: str, sides: list[tuple[str, list[dict[str, Any]]]], key: str) -> str:
    lines = [title]
    for side, same in sides:
        names = {name: None for load in same for name in load[key]}
        shown = [f"{name} {number(median([load[key].get(name, 0.0) for load in same]))}" for name in names]
        lines.append(f"  {side}: {', '.join(shown)}")
    return "\n".join(lines)
