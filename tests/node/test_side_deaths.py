"""Deaths beside the engine: it goes on, streams go on or migrate, discovery forgets the dead at once, the process is back."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests

from shared import supervisord
from tests.frontend import Frontend
from tests.harness import Node, gone, instances, running, send, wait_for
from tests.node.conftest import MODEL
from tests.streams import FOREVER, Result, Streams

Make = Callable[..., Node]
Rounds = Callable[[int], int]
Figures = Callable[..., None]
SECOND = 1.0
BACK_MS = 1500
"""A second, and half of one for a machine that serves 64 streams meanwhile; the figures have what it was."""


@contextmanager
def behind_a_frontend(node: Node) -> Iterator[Frontend]:
    """The node, ready, with a store outside its directory and a migrating frontend that is no part of it."""
    store = node.root / "store"
    node.environment["DYN_FILE_KV"] = str(store)
    store.mkdir()
    node.start()
    with Frontend(store) as frontend:
        node.wait_ready(40)
        wait_for("every agent", lambda: len(instances(node, store)) == row_count(node, "agent:"), 20)
        yield frontend.wait_model(MODEL)


def document(node: Node) -> dict[str, Any]:
    """The status, without a process for it: a test's clock counts milliseconds."""
    found: dict[str, Any] = json.loads(supervisord.call(node.runtime_dir, "sgnode.node"))
    return found


def row(node: Node, name: str) -> dict[str, Any]:
    return next(row for row in document(node)["processes"] if row["name"] == name)


def row_count(node: Node, prefix: str) -> int:
    return sum(row["name"].startswith(prefix) for row in document(node)["processes"])


def ms(since: float) -> float:
    return round((time.monotonic() - since) * 1e3, 1)


def kill(node: Node, name: str) -> float:
    """SIGKILL, proven; when."""
    pid, at = row(node, name)["pid"], time.monotonic()
    send(pid, signal.SIGKILL)
    wait_for(f"{name}'s end", lambda: gone(pid), 2, every=0.0005)
    return at


def back(node: Node, name: str, old: int) -> bool:
    """Ready in a new life. A frontend says nothing, and supervisord calls it started after a second: it must answer."""
    found = row(node, name)
    if found["pid"] in (None, old) or name != "frontend":
        return found["pid"] not in (None, old) and found["state"] == "ready"
    try:
        port = document(node)["ports"]["http"]
        return bool(requests.get(f"http://127.0.0.1:{port}/v1/models", timeout=0.5).json()["data"])
    except requests.RequestException:
        return False


@pytest.mark.soak
def test_no_stream_is_lost_by_a_side_process(make_node: Make, rounds: Rounds, figures: Figures) -> None:
    node = make_node("--agents", "2", dials="step_seconds=0.03")
    with behind_a_frontend(node) as frontend:
        store, engine = node.root / "store", row(node, "engine")["pid"]
        for number in range(rounds(20)):
            for name in ("relay", "prober", "coordinator", "frontend", "agent:0"):
                with Streams() as streams:
                    long = streams.start(frontend.url, MODEL, 64, 100)
                    streams.flowing(long)
                    before = {path.name for path in instances(node, store)}
                    old = row(node, name)
                    at = kill(node, name)
                    measured: dict[str, float] = {}
                    if name == "agent:0":
                        dead = f"{int(old['detail'].split()[-1]):x}"
                        assert any(entry.endswith(dead) for entry in before)
                        wait_for("revoked", lambda dead=dead: not list(store.rglob(f"*%2F{dead}")), 5, every=0.001)
                        measured["revoked_ms"] = ms(at)
                    new: list[Result] = []
                    while time.monotonic() - at < SECOND:
                        new += streams.start(frontend.url, MODEL, 1, 5)
                        if "back_ms" not in measured and back(node, name, old["pid"]):
                            measured["back_ms"] = ms(at)
                        time.sleep(0.05)
                    if "back_ms" not in measured:
                        wait_for(f"{name} back", lambda name=name, old=old: back(node, name, old["pid"]), 10)
                        measured["back_ms"] = ms(at)
                    streams.join()
                lost = [r for r in long if not (r.complete and r.tokens == 100)]
                failed = [r for r in new if not r.complete]
                figures(round=number, killed=name, lost=len(lost), new=len(new), failed=len(failed), **measured)
                assert not lost and not failed and len(new) > 5, (lost + failed)[:2]
                assert measured["back_ms"] < BACK_MS and measured.get("revoked_ms", 0) < 250, measured
                assert row(node, "engine")["pid"] == engine and row(node, "keeper")["restarts"] == 0
                wait_for("both agents", lambda: len(instances(node, store)) == 2, 10)
                node.wait_ready(20)


@pytest.mark.soak
def test_the_only_agents_death_is_a_measured_gap_and_leaves_nothing_running(
    make_node: Make, streams: Streams, rounds: Rounds, figures: Figures
) -> None:
    node = make_node()
    with behind_a_frontend(node) as frontend:
        engine = row(node, "engine")["pid"]
        for number in range(rounds(20)):
            own = Streams()
            own.flowing(own.start(node.url, MODEL, 8, FOREVER))  # the node's own frontend does not migrate
            running(node, 8)
            old = row(node, "agent:0")["pid"]
            at = kill(node, "agent:0")
            own.join(10)
            assert all(r.error for r in own.results)
            own.close()
            tries: list[Result] = []
            while not any(r.complete for r in tries) and time.monotonic() - at < 20:
                tries += streams.start(frontend.url, MODEL, 1, 3)
                time.sleep(0.02)
            wait_for("an answer", lambda tries=tries: all(r.ended for r in tries), 20)
            first = min(r.ended for r in tries if r.complete) - at
            wait_for("the dead one's requests aborted", lambda: document(node)["inflight"] == 0, 5)
            aborted = ms(at)
            wait_for("back", lambda old=old: back(node, "agent:0", old), 5)
            failed = sum(not r.complete for r in tries)
            figures(round=number, answer_after_ms=round(first * 1e3), failed=failed, tries=len(tries), aborted_ms=aborted)
            assert first < 3 and row(node, "engine")["pid"] == engine
            node.wait_ready(20)


@pytest.mark.soak
def test_a_killed_keeper_ends_streams_at_once(make_node: Make, rounds: Rounds, figures: Figures) -> None:
    for number in range(rounds(5)):
        node = make_node().start().wait_ready(40)
        with Streams() as streams:
            results = streams.start(node.url, MODEL, 32, FOREVER)
            streams.flowing(results)
            engine = row(node, "engine")["pid"]
            at = kill(node, "keeper")
            wait_for("withdrawn", lambda node=node: not instances(node), 5, every=0.002)
            withdrawn = ms(at)
            streams.join(10)
            ended = sorted((r.ended - at) * 1e3 for r in results)
            assert all(r.error for r in results) and gone(engine)
        figures(round=number, ended_median_ms=round(ended[16], 1), ended_worst_ms=round(ended[-1], 1), withdrawn_ms=withdrawn)
        assert ended[16] < 200 and ended[-1] < 500 and withdrawn < 500
        again = node.wait_ready(20).status()
        assert again["incarnation"] == 2
        node.close()


def test_what_a_killed_node_left_in_discovery_goes_at_its_next_start(make_node: Make) -> None:
    node = make_node("--agents", "2", "--no-frontend")
    with behind_a_frontend(node):
        store = node.root / "store"
        left = instances(node, store)
        assert len(left) == 2 and node.process is not None
        send(node.process.pid, signal.SIGKILL)
        node.process.wait(5)
        killed = time.monotonic()
        assert all(path.exists() for path in left)
        node.start()
        wait_for("revoked", lambda: not any(path.exists() for path in left), 20)
        assert time.monotonic() - killed < 5, "that was the store's own time to live"
        node.wait_ready(20)
