"""Two real nodes behind Dynamo frontends of a cluster: deaths, a hang, restarts. Streams end at once, or go on elsewhere."""

import itertools
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import MODEL
from tests.frontend import Frontend
from tests.harness import CPU, ONE_THREAD, Node, instances, send, wait_for
from tests.streams import Result, Streams

STREAMS = 8
TOKENS = 800
"""Several seconds on two cores that two engines share."""


@dataclass
class Cluster:
    """``failing``: a frontend that doesn't migrate, so that a stream's end is seen; ``migrating``: one that does."""

    store: Path
    nodes: list[Node]
    failing: Frontend
    migrating: Frontend

    def whole(self, seconds: float = 120.0) -> None:
        """Wait until both nodes are ready and both frontends know it."""
        for node in self.nodes:
            node.wait_ready(seconds)
        wait_for("both workers", lambda: len(instances(self.nodes[0], self.store)) == len(self.nodes), 20)


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    store = tmp_path_factory.mktemp("cluster") / "store"
    env = {"DYN_FILE_KV": str(store), **ONE_THREAD}
    arguments = [str(model), "--served-model-name", MODEL, *CPU, "--no-frontend"]
    with (
        Node(*arguments, name="one", env=env) as one,
        Node(*arguments, name="two", env=env) as two,
        Frontend(store, 0) as failing,
        Frontend(store, 3) as migrating,
    ):
        for node in (one, two):
            node.start()
        for node in (one, two):
            node.wait_ready(240)
        made = Cluster(store, [one, two], failing.wait_model(MODEL), migrating.wait_model(MODEL))
        made.whole()
        yield made


def worker(node: Node, store: Path) -> Path:
    """The node's own record in the shared store."""
    number = int(node.process_row("agent:0")["detail"].removeprefix("worker "))
    return next(path for path in instances(node, store) if path.name.endswith(f"{number:x}"))


def victim_of(node: Node, who: str) -> int:
    engine = psutil.Process(node.pid("engine"))
    if who == "engine":
        return int(engine.pid)
    return next(int(child.pid) for child in engine.children(recursive=True) if who in " ".join(child.cmdline()))


@pytest.mark.soak
def test_a_death_costs_no_stream_that_may_migrate(
    cluster: Cluster, rounds: Callable[[int], int], figures: Callable[..., None]
) -> None:
    victims = itertools.cycle(("sglang::scheduler", "sglang::detokenizer", "engine"))
    for number, who, node in zip(range(rounds(6)), victims, itertools.cycle(cluster.nodes), strict=False):
        cluster.whole()
        with Streams() as streams:
            direct = streams.start(cluster.failing.url, MODEL, STREAMS, TOKENS)
            moving = streams.start(cluster.migrating.url, MODEL, STREAMS, TOKENS)
            streams.flowing([*direct, *moving])
            record, victim = worker(node, cluster.store), victim_of(node, who)
            began = time.monotonic()
            send(victim, signal.SIGKILL)
            wait_for("withdrawn", lambda record=record: not record.exists(), 10, every=0.002)
            withdrawn = time.monotonic() - began
            streams.join()
        lost = [r for r in direct if not r.complete]
        assert len(lost) == STREAMS // 2, "round robin gave each node half of them"
        ends = [r.ended - began for r in lost]
        figures(who=who, round=number, stream_end_ms=round(max(ends) * 1e3), withdrawn_ms=round(withdrawn * 1e3))
        assert max(ends) < 0.5 and withdrawn < 0.5
        assert all(r.complete and r.tokens == TOKENS for r in moving), moving


def test_a_scheduler_stopped_for_20_s_is_withdrawn_and_taken_back(cluster: Cluster) -> None:
    cluster.whole()
    node = cluster.nodes[1]
    before = node.status()
    record, scheduler = worker(node, cluster.store), victim_of(node, "sglang::scheduler")
    send(scheduler, signal.SIGSTOP)
    began = time.monotonic()
    wait_for("withdrawn", lambda: not record.exists(), 10)
    withdrawn = time.monotonic() - began
    wait_for("unhealthy", lambda: node.status()["state"] == "unhealthy", 2)
    assert f"pid {scheduler}" in node.status()["reason"]
    # The cluster serves on meanwhile.
    with Streams() as streams:
        while time.monotonic() - began < 20:
            streams.start(cluster.failing.url, MODEL, 1, 20)
            assert all(r.complete for r in streams.join())
    assert not record.exists()
    send(scheduler, signal.SIGCONT)
    began = time.monotonic()
    wait_for("taken back", record.exists, 10)
    back = time.monotonic() - began
    print(f"withdrawn after {withdrawn:.2f} s, taken back after {back:.2f} s")
    assert withdrawn < 5 and back < 5
    after = node.wait_ready(10).status()
    assert (after["incarnation"], node.pid("engine")) == (before["incarnation"], engine_of(before))


def engine_of(status: dict[str, list[dict[str, int]]]) -> int:
    return next(row["pid"] for row in status["processes"] if row["name"] == "engine")  # type: ignore[comparison-overlap]


REQUESTS = 1000
CLIENTS = 16


def test_both_nodes_restarted_under_load_fail_no_request(cluster: Cluster) -> None:
    cluster.whole()
    lengths, thinking = random.Random(7), random.Random(8)
    todo = iter([lengths.choice((1, 8, 16, 32, 64, 128)) for _ in range(REQUESTS)])
    lock, done = threading.Lock(), threading.Event()
    results: list[tuple[int, Result]] = []
    during: list[int] = []

    def client() -> None:
        with Streams() as streams:
            while True:
                with lock:
                    # The last hundred wait until both have been restarted: requests run all the time.
                    tokens = next(todo, None)
                if tokens is None:
                    return
                if not done.is_set():
                    time.sleep(thinking.uniform(0, 4))  # so that the requests last as long as two restarts
                result = streams.start(cluster.migrating.url, MODEL, 1, tokens)[0]
                streams.join()
                with lock:
                    results.append((tokens, result))
                if len(results) > REQUESTS - 100:
                    done.wait(180)

    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    began = time.monotonic()
    for thread in clients:
        thread.start()
    for node in cluster.nodes:
        wait_for("requests", lambda: len(results) >= 50, 60)
        node.terminate()
        assert node.wait_stopped(120) == 0
        node.start().wait_ready()
        cluster.whole()
        during.append(len(results))
    done.set()
    for thread in clients:
        thread.join(240)
    bad = [(tokens, r) for tokens, r in results if not (r.complete and r.tokens == tokens)]
    took = time.monotonic() - began
    print(f"{len(results)} requests in {took:.0f} s, {during[0]} and {during[1]} done at the restarts' ends, {len(bad)} failed")
    assert len(results) == REQUESTS and not bad, bad[:3]
    assert during[1] > during[0] + 50 > 150
