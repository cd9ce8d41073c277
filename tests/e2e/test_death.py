"""A real engine's processes killed in mid-stream, with two DP ranks: what ends and when, what is left, when it is back."""

import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import MODEL
from tests.harness import CPU, Node, gone, instances, marked_pids, send, wait_for
from tests.streams import Streams

STREAMS = 8
TOKENS = 3000
VICTIMS = {
    "scheduler": r"sglang::scheduler_DP0",
    "second scheduler": r"sglang::scheduler_DP1",
    "detokenizer": r"sglang::detokenizer",
    "engine": "",
}


@pytest.fixture(scope="module")
def node(model: Path) -> Iterator[Node]:
    with Node(str(model), "--served-model-name", MODEL, *CPU, "--dp-size", "2") as node:
        yield node.start().wait_ready()


def processes(node: Node) -> dict[int, str]:
    """The engine's tree: title by pid."""
    engine = psutil.Process(node.pid("engine"))
    return {process.pid: " ".join(process.cmdline()) for process in (engine, *engine.children(recursive=True))}


def start_seconds(node: Node) -> float:
    """From the keeper's start to the engine's being ready, of the newest incarnation, as its log has it."""
    said = re.findall(r"incarnation (\d+) .*ready after ([\d.]+) s", (node.runtime_dir / "log" / "engine.log").read_text())
    return float(said[-1][1])


@pytest.mark.soak
@pytest.mark.parametrize("who", VICTIMS)
def test_a_killed_process_ends_every_stream_at_once_and_the_engine_is_back(
    node: Node, rounds: Callable[[int], int], figures: Callable[..., None], who: str
) -> None:
    ended, withdrawals = [], []
    for number in range(rounds(5)):
        # A death after a quiet time is restarted at once; the back-off of several in a row is another test's.
        node.sgnode("restart", "engine") if number else None
        before = node.wait_ready().status()
        with Streams() as streams:
            results = streams.start(node.url, MODEL, STREAMS, TOKENS)
            streams.flowing(results)
            (record,), tree = instances(node), processes(node)
            engine = node.pid("engine")
            victim = next(pid for pid, title in tree.items() if VICTIMS[who] in title and (VICTIMS[who] or pid == engine))
            began = time.monotonic()
            send(victim, signal.SIGKILL)
            wait_for("withdrawn", lambda record=record: not record.exists(), 10, every=0.002)
            withdrawn = time.monotonic() - began
            wait_for("no orphan", lambda tree=tree: all(map(gone, tree)), 1.0 - (time.monotonic() - began), every=0.005)
            orphans = time.monotonic() - began
            streams.join()
            node.wait_ready()
            back = time.monotonic() - began
        assert all(r.error and not r.finish for r in results), results
        ends = [r.ended - began for r in results]
        after = node.status()
        assert (after["state"], after["incarnation"]) == ("ready", before["incarnation"] + 1)
        assert instances(node) == [record], "registered again under the same worker id"
        assert set(tree).isdisjoint(marked_pids(node.runtime_dir))
        with Streams() as streams:
            streams.start(node.url, MODEL, 4, 16)
            assert all(r.complete for r in streams.join())
        figures(
            who=who,
            round=number,
            stream_end_ms=round(max(ends) * 1e3),
            withdrawn_ms=round(withdrawn * 1e3),
            all_gone_ms=round(orphans * 1e3),
            ready_s=round(back, 1),
        )
        ended.append(max(ends))
        withdrawals.append(withdrawn)
    for seconds in (ended, withdrawals):
        assert statistics.median(seconds) < 0.2 and max(seconds) < 0.5, seconds
