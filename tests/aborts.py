"""When an engine ended a request because its client had gone, read from its log."""

import datetime
import re
import statistics
import time
from collections.abc import Callable

from tests.harness import Node, wait_for

LOG_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}")
STEP_SECONDS = 0.05
"""An engine step on two cores with several streams."""
PROMPT_SECONDS = 0.1
"""On top of a step, at the median (design: cancellation)."""


def aborts(node: Node) -> list[float]:
    """UNIX times at which the engine ended a request with an abort."""
    times = []
    for line in (node.runtime_dir / "log" / "engine.log").read_text(errors="replace").splitlines():
        if "Aborted Request ID" in line and (found := LOG_TIME.search(line)):
            times.append(datetime.datetime.strptime(found.group(), "%Y-%m-%d %H:%M:%S,%f").timestamp())
    return times


def submitted(node: Node) -> int:
    """How many requests its first agent has handed to the engine."""
    return (node.runtime_dir / "log" / "agent-0.log").read_text(errors="replace").count("Submitted SGLang Request ID")


def delays(node: Node, rounds: int, leave: Callable[[], None]) -> list[float]:
    """Seconds from each ``leave``, which closes a client's connection, to the end of its request in the engine."""
    found = []
    for _ in range(rounds):
        known = len(aborts(node))
        leave()
        closed = time.time()
        seen = wait_for("abort in the engine", lambda known=known: aborts(node)[known:], 10, every=0.005)
        found.append(seen[0] - closed)
    return found


def prompt(what: str, found: list[float], step: float = STEP_SECONDS) -> None:
    """At the median within one step and 100 ms."""
    print(f"{what}: median {statistics.median(found) * 1e3:.1f} ms, worst {max(found) * 1e3:.1f} ms")
    assert statistics.median(found) < step + PROMPT_SECONDS, f"{what}: delays in s: {sorted(found)}"
