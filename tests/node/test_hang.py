"""Hangs: a stopped process is noticed, withdrawn, taken back without a restart, and killed when it stays stuck."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import Node, instances, marked_pids, send, wait_for
from tests.node.conftest import MODEL
from tests.streams import FOREVER, Streams

Make = Callable[..., Node]


def titled(node: Node, title: str) -> int:
    """The process of the node that has this title."""

    def command(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0")
        except OSError:
            return ""

    return next(pid for pid in marked_pids(node.runtime_dir) if title in command(pid))


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.parametrize("who", ["sgnode::child1", "engine"])
def test_a_stopped_engine_is_withdrawn_and_taken_back_without_a_restart(make_node: Make, streams: Streams, who: str) -> None:
    node = make_node().start().wait_ready(40)
    engine, url = node.pid("engine"), node.url
    results = streams.start(url, MODEL, 4, 500)
    streams.flowing(results)
    pid = engine if who == "engine" else titled(node, who)
    send(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    wait_for("withdrawn", lambda: not instances(node), 10)
    withdrawn = time.monotonic() - stopped
    wait_for("its kill announced", lambda: "its kill in" in node.status()["waiting_for"], 5)
    status = node.status()
    assert status["state"] == "unhealthy" and (who == "engine" or f"pid {pid}" in status["reason"]), status
    send(pid, signal.SIGCONT)
    let_go = time.monotonic()
    wait_for("taken back", lambda: instances(node), 10)
    back = time.monotonic() - let_go
    print(f"{who}: withdrawn after {withdrawn:.2f} s, taken back after {back:.2f} s")
    assert withdrawn < 5 and back < 5
    streams.join()
    assert all(r.complete and r.tokens == 500 for r in results), results
    status = node.wait_ready(10).status()
    assert node.pid("engine") == engine and status["incarnation"] == 1


def test_an_engine_stuck_past_the_deadline_is_killed_and_started_again(make_node: Make, streams: Streams) -> None:
    node = make_node("--hang-timeout", "4").start().wait_ready(40)
    engine = node.pid("engine")
    results = streams.start(node.url, MODEL, 4, FOREVER)
    streams.flowing(results)
    send(engine, signal.SIGSTOP)
    stopped = time.monotonic()
    streams.join(30)
    ended = time.monotonic() - stopped
    assert all(r.error and not r.finish for r in results), results
    assert 3 < ended < 9, f"streams ended {ended:.1f} s after the stop"
    wait_for("a new engine", lambda: node.status().get("incarnation") == 2, 20)
    status = node.wait_ready(30).status()
    assert node.pid("engine") != engine and status["incarnation"] == 2
    assert all("SIGKILL" not in row["detail"] for row in status["processes"] if row["name"] != "engine")


def test_a_stopped_agent_costs_its_own_streams_and_little_memory(make_node: Make, streams: Streams) -> None:
    node = make_node("--agents", "2", dials="step_seconds=0.005,tokens_per_step=4").start().wait_ready(40)
    wait_for("both agents", lambda: len(instances(node)) == 2, 20)
    results = streams.start(node.url, MODEL, 64, FOREVER)
    streams.flowing(results)
    engine, victim = node.pid("engine"), node.pid("agent:0")
    before = resident_mb(engine)
    send(victim, signal.SIGSTOP)
    stopped = time.monotonic()
    most = [before]

    def killed() -> bool:
        most.append(resident_mb(engine))
        return node.pid("agent:0") not in (0, victim)

    wait_for("killed and started again", killed, 40, every=0.2)
    took = time.monotonic() - stopped
    wait_for("both agents again", lambda: len(instances(node)) == 2, 20)
    lost = [r for r in results if r.ended]
    print(f"agent killed {took:.1f} s after SIGSTOP; {len(lost)} of 64 streams lost; engine {before:.0f} -> {max(most):.0f} MB")
    assert 0 < len(lost) < 64 and all(r.error for r in lost)
    assert max(most) - before < 100
    chunks = [r.chunks for r in results if not r.ended]
    wait_for(
        "the others go on", lambda: all(r.chunks > n for r, n in zip([r for r in results if not r.ended], chunks, strict=False))
    )
    assert node.pid("engine") == engine and node.status()["incarnation"] == 1
