"""A model over two hosts, tp=2 over gloo, real SGLang on each: starts in both orders, deaths of schedulers, a pulled cable."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import SOAK
from tests.e2e.conftest import MODEL
from tests.harness import CPU, TWO_RANKS, Node, gone, marked_pids, send, wait_for
from tests.hosts import CABLE, CLIENT, Hosts
from tests.streams import Streams

DEADLINE = 2.0
"""Heartbeat deadline: the default."""
APART_SECONDS = 60.0 if SOAK else 5.0
"""Between the starts of the two nodes."""
TOKENS = 24
"""A tp=2 group on two cores makes some 30 tokens/s."""
LONG = 3000
BACKOFF_SECONDS = 2.0
"""At most, for the deaths here."""


class TwoHosts:
    """``nodes[i]`` is rank i, on host i."""

    def __init__(self, hosts: Hosts, model: Path) -> None:
        self.hosts = hosts
        self.nodes: list[Node] = []
        group = ["--nnodes", "2", "--tp-size", "2", "--dist-init-addr", f"{CABLE[0]}:29500"]
        for rank in (0, 1):
            flags = [str(model), "--served-model-name", MODEL, *CPU, *group, "--node-rank", str(rank)]
            env = {
                **TWO_RANKS,
                "GLOO_SOCKET_IFNAME": hosts.ends[rank],
                "SGLANG_HOST_IP": CABLE[rank],
            }
            node = Node(*flags, "--http-host", CLIENT[1], "--drain-grace", "1", name=f"host{rank}", env=env)
            node.program = [*hosts.enter(rank), *node.program]
            node.address = CLIENT[1]
            self.nodes.append(node)
        self.start_seconds = 0.0
        """From an epoch's beginning to ready: the first one's."""

    @property
    def epoch(self) -> int:
        return int(self.nodes[0].status().get("epoch", 0))

    def wait_ready(self, epoch: int, seconds: float = 180.0) -> float:
        """Wait for an epoch and for both ranks to be ready in it; seconds from its beginning."""

        def begun() -> bool:
            for node in self.nodes:
                assert node.process is not None and node.process.poll() is None, self.logs()
            return self.epoch == epoch

        wait_for(f"epoch {epoch}", begun, 60)
        began = time.monotonic()
        for node in reversed(self.nodes):
            node.wait_ready(seconds)
        return time.monotonic() - began

    def trees(self) -> list[int]:
        """Every process of both engines."""
        pids = [node.pid("engine") for node in self.nodes]
        return pids + [child.pid for pid in pids for child in psutil.Process(pid).children(recursive=True)]

    def scheduler(self, rank: int) -> int:
        children = psutil.Process(self.nodes[rank].pid("engine")).children(recursive=True)
        return next(int(child.pid) for child in children if "sglang::scheduler" in " ".join(child.cmdline()))

    def complete(self) -> None:
        """A streamed completion through the leader's frontend."""
        with Streams() as streams:
            (result,) = streams.start(self.nodes[0].url, MODEL, 1, TOKENS)
            streams.join()
        assert result.complete and result.tokens == TOKENS and result.chunks > 1, result

    def logs(self) -> str:
        return "\n".join(node.logs() for node in self.nodes)


@pytest.fixture(scope="module")
def two(model: Path) -> Iterator[TwoHosts]:
    """The follower is started first, the leader a while later."""
    if os.geteuid():
        pytest.skip("network namespaces need root")
    hosts = Hosts()
    made = TwoHosts(hosts, model)
    leader, follower = made.nodes
    try:
        follower.start()
        _alone(follower, f"rank 0 of 2 (the leader, {CABLE[0]}:29600) not seen, ")
        leader.start()
        made.start_seconds = made.wait_ready(1)
        yield made
    finally:
        for node in made.nodes:
            node.close()
        hosts.close()


def _alone(node: Node, words: str) -> None:
    """For a while the node waits, says for whom and since when, and starts no engine."""

    def waited() -> bool:
        status = node.status()
        text = str(status.get("waiting_for", ""))
        if status.get("state") != "waiting" or not text.startswith(words):
            return False
        assert not node.pid("engine")
        return float(text.removeprefix(words).split()[0]) >= APART_SECONDS

    wait_for(f"{words}{APART_SECONDS:.0f} s", waited, APART_SECONDS + 60, every=0.2)


def test_a_streamed_completion_over_two_hosts(two: TwoHosts) -> None:
    two.complete()
    leader, follower = two.nodes
    assert [row["name"] for row in follower.status()["processes"]] == ["coordinator", "relay", "keeper", "engine", "prober"]
    assert {"agent:0", "frontend"} <= {row["name"] for row in leader.status()["processes"]}
    titles = [" ".join(psutil.Process(pid).cmdline()) for pid in marked_pids(follower.runtime_dir)]
    assert not any("agent" in title or "frontend" in title or "detokenizer" in title for title in titles), titles
    assert sum("sglang::scheduler_TP1" in title for title in titles) == 1


@pytest.mark.soak
@pytest.mark.parametrize("rank", [1, 0])
def test_a_scheduler_s_death_on_either_host(
    two: TwoHosts, streams: Streams, rounds: Callable[[int], int], figures: Callable[..., None], rank: int
) -> None:
    for number in range(rounds(5)):
        _one_end(two, streams, figures, f"scheduler of rank {rank}", lambda: send(two.scheduler(rank), signal.SIGKILL), number)


def test_a_pulled_cable(two: TwoHosts, streams: Streams, figures: Callable[..., None]) -> None:
    def pull() -> None:
        two.hosts.cable("down")
        wait_for("no carrier", lambda: not two.hosts.carrier, 2, every=0.005)

    def back() -> None:
        leader, follower = two.nodes
        wait_for("the leader misses it", lambda: "rank 1 of 2 not seen" in str(leader.status().get("waiting_for")), 10)
        wait_for("so does the other", lambda: "rank 0 of 2" in str(follower.status().get("waiting_for")), 10)
        two.hosts.cable("up")

    _one_end(two, streams, figures, "cable", pull, 0, back)


def _one_end(
    two: TwoHosts,
    streams: Streams,
    figures: Callable[..., None],
    what: str,
    fault: Callable[[], None],
    number: int,
    mend: Callable[[], None] = lambda: None,
) -> None:
    two.nodes[0].sgnode("restart", "engine") if number else None  # repeated faults shall not become a crash loop
    epoch = two.epoch
    two.wait_ready(epoch)
    results, trees = streams.start(two.nodes[0].url, MODEL, 4, LONG), two.trees()
    streams.flowing(results, 60)
    began = time.monotonic()
    fault()
    streams.join()
    ended = max(r.ended for r in results) - began
    wait_for("both engines gone", lambda: all(gone(pid) for pid in trees), DEADLINE + 1.0, every=0.005)
    cleared = time.monotonic() - began
    assert all("503" in r.error for r in results), results[0]
    mend()
    mended = time.monotonic()
    wait_for("the next epoch", lambda: two.epoch == epoch + 1, 30)
    opened = time.monotonic() - mended
    ready = opened + two.wait_ready(epoch + 1)
    figures(
        what=what, round=number, stream_end_ms=round(ended * 1e3), gone_ms=round(cleared * 1e3), epoch_s=round(opened, 2),
        ready_s=round(ready, 1), first_start_s=round(two.start_seconds, 1),
    )  # fmt: skip
    assert ended < DEADLINE + 0.5
    assert cleared < DEADLINE + 1.0
    assert ready < two.start_seconds + 3 + BACKOFF_SECONDS
    two.complete()


if SOAK:  # with synthetic engines both orders are in tests/node/test_group.py

    @pytest.mark.soak
    def test_the_leader_first_and_a_follower_much_later(two: TwoHosts) -> None:
        leader, follower = two.nodes
        epoch = two.epoch
        follower.terminate()
        assert follower.wait_stopped(60) == 0
        wait_for("no process left", lambda: not marked_pids(follower.runtime_dir), 5)
        _alone(leader, "rank 1 of 2 not seen, ")
        follower.start()
        two.wait_ready(epoch + 1)
        two.complete()
