"""What `sgnode status --watch` shows: one pure function from the status document to lines that fit the terminal. Needs rich."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

from rich.text import Text

from shared import table
from shared.table import span

COLOURS = {
    "ready": "green",
    "failed": "bold red",
    "unhealthy": "bold red",
    "lost": "bold red",
    "stopped": "red",
    "drained": "cyan",
    "paused": "cyan",
    "sleeping": "cyan",
}
"""Of states; all others are on their way: yellow. Without colours the words say the same."""
ON_THE_WAY = "yellow"
WELL = ("ready", "drained", "sleeping", "paused")
HISTORY = 240
"""Values of tokens/s that are kept."""
KV_LINES = 2
"""More DP ranks than that share lines."""


@dataclass(frozen=True)
class Glyphs:
    """What bars and curves are drawn with: empty and full first, the steps between them after."""

    empty: str
    steps: str
    curve: str
    more: str


UNICODE = Glyphs("░", "▏▎▍▌▋▊▉█", "▁▂▃▄▅▆▇█", "…")
ASCII = Glyphs(".", "#", " .:-=+*#", "...")


@dataclass
class Seen:
    """What the watcher knows beside the document."""

    rates: list[float] = field(default_factory=list)
    """Tokens a second, the newest last."""
    trouble: str = ""
    """Why the document is an old one."""
    gone_at: float | None = None
    """UNIX seconds: since when no node answers."""
    every: float = 1.0


def picture(
    document: Mapping[str, Any], seen: Seen, *, width: int, height: int, glyphs: Glyphs = UNICODE, now: float | None = None
) -> list[Text]:
    """At most ``height`` lines of at most ``width`` columns. ``now``: UNIX seconds."""
    now = time.time() if now is None else now
    if not document or seen.gone_at is not None:
        lines = [_title(Text(f"node {document.get('name', '')}".strip(), "bold"), seen, width, now), *_trouble(seen)]
        if document and seen.gone_at is not None:
            said = ", ".join(filter(None, (document.get("state"), document.get("reason"))))
            lines.append(Text(f"  last heard {span(now - seen.gone_at)} ago: {said}"))
            lines += [Text(line, "red") for line in table.crash_lines(document, now)]
        return [*(_cut(line, width, glyphs) for line in [*lines[: height - 2], Text(), _footer()])][:height]
    state = str(document.get("state", "?"))
    head = Text(f"node {document.get('name', '?')}: ", "bold").append(state, _style(state))
    if document.get("since"):
        head.append(f" for {span(now - document['since'])}", "not bold")
    top = [_title(head, seen, width, now), *_trouble(seen)]
    top += [Text(f"  {line}") for line in (document.get("reason"), _waiting(document)) if line]
    top += [Text(f"  {document['logs']}")] if document.get("logs") else []
    top += [Text(line) for line in table.group_lines(document)]
    if document.get("stale_s"):
        top.append(Text(f"  as of {span(document['stale_s'])} ago: the coordinator is not reporting", "bold red"))
    top += [
        Text(f"  {line}", "dim")
        for line in _packed([fact for fact in table.fact_words(document) if "in flight" not in fact], width)
    ]
    if (document.get("startup") or {}).get("current"):
        for line in table.startup_lines(document, now):
            top += [Text(part) for part in wrap(line, width, subsequent_indent="    ")]
    top += [Text(), *_progress(document, width, glyphs, now), *_load(document, seen, width, glyphs)]
    crash = [Text(line, "red") for line in table.crash_lines(document, now)]
    rows = [table.cells(_with_streams(process)) for process in document.get("processes", ())]
    room = height - len(top) - 3  # the blank line before the table, its headings, the footer
    if len(crash) + len(rows) > room:
        # The end of a log is the part that says why.
        keep = max(4, room - len(rows))
        crash = crash if len(crash) <= keep else [*crash[:2], *crash[len(crash) - keep + 2 :]]
    shown, left_out = _chosen(rows, room - len(crash))
    lines = [*top, *crash, Text(), *_table(shown)]
    if left_out:
        lines.append(Text(f"{glyphs.more} and {left_out} more, all well", "dim"))
    return [_cut(line, width, glyphs) for line in [*lines[: height - 1], _footer()]]


def bar(part: float, width: int, glyphs: Glyphs = UNICODE) -> str:
    """A bar of ``width`` columns, full at 1.0."""
    steps = len(glyphs.steps)
    filled = round(max(0.0, min(1.0, part)) * width * steps)
    whole, rest = divmod(filled, steps)
    drawn = glyphs.steps[-1] * whole + (glyphs.steps[rest - 1] if rest else "")
    return drawn + glyphs.empty * (width - len(drawn))


def curve(values: Sequence[float], width: int, glyphs: Glyphs = UNICODE) -> str:
    """The newest ``width`` values as one line of heights; the highest is the largest of them."""
    newest = list(values[-width:]) if width > 0 else []
    top = max(newest, default=0.0)
    last = len(glyphs.curve) - 1
    return "".join(glyphs.curve[round(value / top * last) if top > 0 else 0] for value in newest)


def _style(state: str) -> str:
    return COLOURS.get(state, ON_THE_WAY)


def _title(head: Text, seen: Seen, width: int, now: float) -> Text:
    clock = f"{time.strftime('%H:%M:%S', time.localtime(now))}  every {seen.every:g} s"
    return head.append(" " * max(1, width - head.cell_len - len(clock))).append(clock, "dim")


def _footer() -> Text:
    return Text("q leaves", "dim")


def _trouble(seen: Seen) -> list[Text]:
    return [Text(f"  {seen.trouble}", "bold red reverse")] if seen.trouble else []


def _waiting(document: Mapping[str, Any]) -> str:
    return f"waiting for {document['waiting_for']}" if document.get("waiting_for") else ""


def _packed(parts: Sequence[str], width: int, gap: str = "   ") -> list[str]:
    """Parts side by side, in as many lines as they need."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(gap) + len(part) + 2 <= width:
            lines[-1] += gap + part
        else:
            lines.append(part)
    return lines


def _cut(line: Text, width: int, glyphs: Glyphs) -> Text:
    line.no_wrap = True
    if line.cell_len > width:
        line.truncate(width - len(glyphs.more))
        line.append(glyphs.more)
    return line


def _progress(document: Mapping[str, Any], width: int, glyphs: Glyphs, now: float) -> list[Text]:
    """A load against the one before, a drain against its time limit."""
    long = max(10, min(40, width - 50))
    drain, last = document.get("drain"), document.get("last_load_s")
    if drain and drain["of_s"]:
        done = 1 - drain["left_s"] / drain["of_s"]
        words = f"{drain['streams']} streams left, {drain['left_s']:.0f} s of {drain['of_s']:.0f}"
        return [Text(f"  drain    {bar(done, long, glyphs)}  {words}", ON_THE_WAY)]
    since = document.get("loading_since")
    if since and last:
        words = f"{max(0.0, now - since):.0f} s; the last one took {last:.0f} s"
        return [Text(f"  load     {bar((now - since) / last, long, glyphs)}  {words}", ON_THE_WAY)]
    return []


def _load(document: Mapping[str, Any], seen: Seen, width: int, glyphs: Glyphs) -> list[Text]:
    """Streams, rate, latencies, KV use."""
    rate = document.get("tokens_per_s")
    kv: Sequence[Mapping[str, Any]] = document.get("kv") or ()
    waiting = sum(use["waiting"] for use in kv)
    words = f"  streams  {document.get('streams', 0)}"
    if kv:
        words += f"   waiting {waiting}"
    words += f"   tokens/s {'-' if rate is None else f'{rate:,.0f}'}  "
    first = Text(words)
    first.append(curve(seen.rates, min(HISTORY, width - len(words) - 1), glyphs), "cyan")
    lines = [first, Text(f"  TTFT     {_quantiles(document.get('ttft'))}   ITL {_quantiles(document.get('itl'))}")]
    if kv or document.get("state") == "ready":
        lines += [Text(f"  {line}") for line in _kv(kv, width, glyphs)]
    return lines


def _quantiles(found: Mapping[str, float] | None) -> str:
    return f"p50 {_time(found['p50_s'])}  p99 {_time(found['p99_s'])}" if found else "-"


def _time(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:.0f} s"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"


def _kv(kv: Sequence[Mapping[str, Any]], width: int, glyphs: Glyphs) -> list[str]:
    """A bar for each DP rank."""
    if not kv:
        return ["KV use   not reported (SGLang does with --enable-metrics and --kv-events-config)"]
    if len(kv) > KV_LINES:
        cells = [f"dp{use['dp_rank']} {bar(_part(use), 8, glyphs)} {_part(use):4.0%} ({use['waiting']})" for use in kv]
        return ["KV use (waiting)", *(f"  {line}" for line in _packed(cells, width - 2))]
    lines = []
    for use in kv:
        rank = f"dp{use['dp_rank']}" if len(kv) > 1 else ""
        also = f", {use['waiting']} waiting" if len(kv) > 1 else ""
        words = f"{_part(use):4.0%}  {use['used_blocks']:,} of {use['total_blocks']:,} blocks{also}"
        words += f", prefix hits {use['prefix_hit_rate']:.0%}"
        long = max(10, min(40, width - len(words) - 14))
        lines.append(f"{f'KV {rank}' if rank else 'KV use':7}  {bar(_part(use), long, glyphs)} {words}")
    return lines


def _part(use: Mapping[str, Any]) -> float:
    return float(use["used_blocks"] / use["total_blocks"]) if use["total_blocks"] else 0.0


def _with_streams(process: Mapping[str, Any]) -> Mapping[str, Any]:
    """An agent's row, with its streams in front of what it says."""
    count = (process.get("numbers") or {}).get("inflight")
    if not count or not str(process.get("name", "")).startswith("agent"):
        return process
    streams = f"{count:.0f} stream{'s' if count > 1 else ''}"
    return {**process, "detail": "; ".join(filter(None, (streams, process.get("detail"))))}


def _chosen(rows: list[tuple[str, ...]], room: int) -> tuple[list[tuple[str, ...]], int]:
    """The rows that there is room for: those that are well go first, from the end; how many went."""
    if len(rows) <= room:
        return rows, 0
    go = [index for index in range(len(rows) - 1, -1, -1) if rows[index][2] in WELL]
    gone = set(go[: len(rows) - max(0, room - 1)])
    return [row for index, row in enumerate(rows) if index not in gone], len(gone)


def _table(rows: list[tuple[str, ...]]) -> list[Text]:
    lines = [Text(line) for line in table.columns([table.HEADINGS, *rows])]
    lines[0].stylize("bold")
    for line, row in zip(lines[1:], rows, strict=True):
        at = line.plain.find(f"  {row[2]}", len(row[0]))
        line.stylize(_style(row[2]), at + 2, at + 2 + len(row[2]))
    return lines
