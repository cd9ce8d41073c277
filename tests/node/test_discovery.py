"""Discovery gone: what runs goes on, the node says why it waits and is back by itself, the engine is never restarted."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SOAK
from tests.etcd import Etcd
from tests.frontend import Frontend
from tests.harness import Node, gone, instances, send, wait_for
from tests.node.conftest import MODEL
from tests.streams import Streams

Make = Callable[..., Node]
Figures = Callable[..., None]
LEASE_SECONDS = 10
"""Dynamo 1.6.1's lease: it survives a shorter outage; some 28 s into a longer one Dynamo's runtime ends in each process."""


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    if shutil.which("etcd") is None:
        pytest.skip("needs Debian's etcd-server")
    with Etcd(tmp_path) as made:
        yield made


def with_etcd(node: Node, etcd: Etcd) -> Node:
    node.environment |= etcd.environment
    return node.start().wait_ready(40)


def engine_of(node: Node) -> tuple[int, int, int]:
    """What an outage must not change: pid, restarts, incarnation."""
    row = node.process_row("engine")
    return row["pid"], row["restarts"], node.status()["incarnation"]


def test_a_killed_agent_leaves_etcd_at_once(make_node: Make, etcd: Etcd, figures: Figures) -> None:
    node = with_etcd(make_node("--discovery-backend", "etcd", "--no-frontend", "--agents", "2"), etcd)
    wait_for("both agents", lambda: len(etcd.instances()) == 2, 10)
    dead, pid = f"{int(node.process_row('agent:0')['detail'].split()[-1]):x}", node.pid("agent:0")
    assert [key for key in etcd.keys("v1/") if key.endswith(dead)]
    at = time.monotonic()
    send(pid, signal.SIGKILL)
    wait_for("revoked", lambda: dead not in etcd.instances(), 5, every=0.002)
    revoked = time.monotonic() - at
    figures(revoked_ms=round(revoked * 1e3, 1))
    assert revoked < 0.5 and gone(pid)
    assert not [key for key in etcd.keys("v1/") if key.endswith(dead)]
    wait_for("the new agent", lambda: len(etcd.instances()) == 2, 10)


@pytest.mark.soak
@pytest.mark.parametrize("seconds", [9, 60] if SOAK else [9])
def test_etcd_is_stopped(make_node: Make, etcd: Etcd, figures: Figures, streams: Streams, seconds: int) -> None:
    node = make_node("--discovery-backend", "etcd", "--no-frontend", "--agents", "2", dials="step_seconds=0.03")
    with_etcd(node, etcd)
    wait_for("both agents", lambda: len(etcd.instances()) == 2, 10)
    engine = engine_of(node)
    with Frontend(node.root / "none", backend="etcd", env=etcd.environment) as frontend:
        frontend.wait_model(MODEL)
        results = streams.start(frontend.url, MODEL, 8, 400)  # 12 s
        streams.flowing(results)
        etcd.stop()
        stopped = time.monotonic()
        if seconds < LEASE_SECONDS:
            early = streams.start(frontend.url, MODEL, 4, 30)
            streams.flowing(early)  # routers know the workers
        else:
            words = "etcd at 127.0.0.1"
            wait_for("the reason", lambda: words in str(node.status().get("processes")), seconds, every=0.2)
            assert node.status()["state"] == "warming" and not node.status()["registered"]
        wait_for("the outage's end", lambda: time.monotonic() - stopped > seconds, seconds + 1)
        etcd.start()
        returned = time.monotonic()
        wait_for("both agents in etcd", lambda: len(etcd.instances()) == 2, 40)
        node.wait_ready(30)
        back = time.monotonic() - returned
        assert engine_of(node) == engine
        streams.join(60)
        lost = [r for r in results if not (r.complete and r.tokens == 400)]
        figures(seconds=seconds, back_s=round(back, 2), streams=len(results), cut=len(lost))
        if seconds < LEASE_SECONDS:
            assert not lost and all(r.complete for r in streams.results), lost[:1]
    with Frontend(node.root / "none", backend="etcd", env=etcd.environment) as fresh:
        fresh.wait_model(MODEL)
        again = streams.start(fresh.url, MODEL, 4, 10)
        streams.join(30)
        assert all(r.complete for r in again), again


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_the_file_store_becomes_unwritable(make_node: Make, streams: Streams, figures: Figures) -> None:
    node = make_node("--agents", "2", dials="step_seconds=0.03")
    store = node.root / "store"
    store.mkdir()
    node.environment["DYN_FILE_KV"] = str(store)
    node.start().wait_ready(40)
    wait_for("both agents", lambda: len(instances(node, store)) == 2, 10)
    engine, url = engine_of(node), node.url

    def rows() -> list[dict[str, Any]]:
        return [row for row in node.status().get("processes", []) if row["name"].startswith("agent")]

    subprocess.run(["mount", "--bind", str(store), str(store)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(store)], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (store / "v1" / "x").touch()
        results = streams.start(url, MODEL, 8, 150)  # 4.5 s
        streams.flowing(results)
        said = wait_for("the reason", lambda: [row["detail"] for row in rows() if "can't be written" in row["detail"]], 10)
        assert str(store) in said[0]
        new = streams.start(url, MODEL, 4, 10)
        streams.join(30)
        assert all(r.complete for r in results + new), streams.results
    finally:
        subprocess.run(["umount", "-l", str(store)], check=True)
    # Another process of the cluster, which could write all the time, has taken the workers for dead.
    for path in store.glob("v1/*/*"):
        path.unlink()
    gone_at = time.monotonic()
    wait_for("both agents", lambda: len(instances(node, store)) == 2, 10)
    figures(back_s=round(time.monotonic() - gone_at, 2))
    wait_for("no complaint", lambda: "can't" not in str(rows()), 10)
    node.wait_ready(30)
    assert engine_of(node) == engine
    with Frontend(store) as fresh:
        fresh.wait_model(MODEL)
        again = streams.start(fresh.url, MODEL, 4, 10)
        streams.join(30)
        assert all(r.complete for r in again), again
