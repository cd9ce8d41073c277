"""Asks a Prometheus every query of the dashboard: `python -m monitoring.check http://prometheus:9090 [--minutes 60]`.

Exit code 0: each is answered, with data or without; 1: Prometheus refuses one, or all are without data; 2: it can't be reached.
"""

import argparse
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitoring import DASHBOARD

SECONDS = 20.0
"""For one query."""


@dataclass(frozen=True)
class Query:
    """One query of a panel, Grafana's variables still in it. ``instant``: the panel shows its newest value only."""

    panel_id: int
    row: str
    panel: str
    expr: str
    legend: str
    instant: bool


@dataclass(frozen=True)
class Answer:
    """``series``: as Prometheus has them, each with its labels and samples; ``error``: its words when it refused the query."""

    query: Query
    series: list[dict[str, Any]]
    error: str = ""

    def __str__(self) -> str:
        samples = sum(len(each["values"]) for each in self.series)
        says = self.error or (f"{len(self.series)} series, {samples} samples" if self.series else "no data")
        return " | ".join((self.query.row, self.query.panel, self.query.legend, says))


def queries(dashboard: dict[str, Any]) -> Iterator[Query]:
    """All of a dashboard's, in its order."""
    row = ""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        for target in panel.get("targets", []):
            yield Query(panel["id"], row, panel["title"], target["expr"], target["legendFormat"], bool(target.get("instant")))


def filled(expr: str, seconds: int = 3600, interval: str = "1m") -> str:
    """The query as Grafana sends it when every variable says All."""
    for name, value in {"$__rate_interval": interval, "$__range": f"{seconds}s"}.items():
        expr = expr.replace(name, value)
    for name in ("namespace", "node", "worker", "model"):
        expr = expr.replace(f"${name}", ".*")
    return expr


def ask(url: str, query: Query, seconds: int, interval: str) -> Answer:
    """One query over the last ``seconds``. Raises OSError when Prometheus isn't there."""
    now = time.time()
    asked: dict[str, Any] = {"query": filled(query.expr, seconds, interval)}
    asked |= {"time": now} if query.instant else {"start": now - seconds, "end": now, "step": step(seconds)}
    path = "query" if query.instant else "query_range"
    try:
        with urllib.request.urlopen(f"{url}/api/v1/{path}?{urllib.parse.urlencode(asked)}", timeout=SECONDS) as answer:
            found = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        return Answer(query, [], error.read().decode(errors="replace")[:500])
    return Answer(query, [{"metric": each["metric"], "values": each.get("values") or [each["value"]]} for each in found])


def step(seconds: int) -> int:
    """Seconds between two samples of so long a range."""
    return max(1, seconds // 240)


def check(url: str, seconds: int, interval: str = "1m", dashboard: Path = DASHBOARD) -> list[Answer]:
    """Every query's answer. Raises OSError when Prometheus isn't there."""
    asked = queries(json.loads(dashboard.read_text()))
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda query: ask(url, query, seconds, interval), asked))


def parser_of(program: str, description: str) -> argparse.ArgumentParser:
    """Which Prometheus, and over how long; what more a program takes is its own."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument("url", help="of Prometheus, as http://prometheus:9090")
    parser.add_argument("--minutes", type=int, default=60, help="how far back (default: 60)")
    parser.add_argument("--rate-interval", default="1m", help="four scrape intervals or more (default: 1m)")
    return parser


def main() -> int:
    args = parser_of("monitoring.check", "Ask it every query of the dashboard.").parse_args()
    try:
        answers = check(args.url.rstrip("/"), args.minutes * 60, args.rate_interval)
    except OSError as error:
        print(f"{args.url}: {error}; is it Prometheus' address?", file=sys.stderr)
        return 2
    print("\n".join(map(str, answers)))
    empty, refused = sum(not answer.series for answer in answers), sum(bool(answer.error) for answer in answers)
    print(f"{len(answers)} queries: {len(answers) - empty} with data, {empty - refused} without, {refused} refused")
    return 1 if refused or empty == len(answers) else 0


if __name__ == "__main__":
    sys.exit(main())
