"""A real engine's processes killed in mid-stream, with two DP ranks: what ends and when, what is left, when it is back."""

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


@dataclass
class Started:
    """``start_seconds``: from the first engine's process to a node that is ready."""

    node: Node
    start_seconds: float


@pytest.fixture(scope="module")
def started(model: Path) -> Iterator[Started]:
    # SGLang wants a NUMA node for each rank on a CPU, or to be told the cores.
    bind = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    with Node(str(model), "--served-model-name", MODEL, *CPU, "--dp-size", "2", env=bind) as node:
        node.start()
        wait_for("the engine's process", lambda: node.process_row("keeper").get("pid"), 60)
        began = time.monotonic()
        node.wait_ready(240)
        yield Started(node, time.monotonic() - began)


def processes(node: Node) -> dict[int, str]:
    """The engine's tree: title by pid."""
    engine = psutil.Process(node.pid("engine"))
    return {process.pid: " ".join(process.cmdline()) for process in (engine, *engine.children(recursive=True))}


@pytest.mark.soak
@pytest.mark.parametrize("who", VICTIMS)
def test_a_killed_process_ends_every_stream_at_once_and_the_engine_is_back(
    started: Started, rounds: Callable[[int], int], figures: Callable[..., None], who: str
) -> None:
    node, load = started.node, started.start_seconds
    ended, withdrawals, late = [], [], []
    for number in range(rounds(5)):
        before = node.wait_ready().status()
        if len(before["deaths"]) == 4:  # the next would be a crash loop: a restart by hand forgets them
            assert node.sgnode("restart", "engine").returncode == 0
            before = node.wait_ready().status()
        waited = 2 ** (len(before["deaths"]) - 1) if before["deaths"] else 0
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
            # "ready" is said of the dead one for some milliseconds more.
            wait_for("the next engine", lambda before=before: node.status()["incarnation"] > before["incarnation"], 60)
            node.wait_ready()
            back = time.monotonic() - began
        assert all(r.error and not r.finish for r in results), results
        ends = [r.ended - began for r in results]
        after = node.status()
        assert (after["state"], after["incarnation"]) == ("ready", before["incarnation"] + 1), f"{after}\n{node.logs()}"
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
            backoff_s=waited,
            start_s=round(load, 1),
        )
        # One start varies by some seconds with what else runs on the machine; the median of several doesn't.
        assert back < waited + 1.25 * load + 1, f"ready again after {back:.1f} s, a start takes {load:.1f} s"
        late.append(back - waited - load)
        ended.append(max(ends))
        withdrawals.append(withdrawn)
    for seconds in (ended, withdrawals):
        assert max(seconds) < 0.5, seconds
        assert len(seconds) < 3 or statistics.median(seconds) < 0.2, seconds
    assert len(late) < 3 or statistics.median(late) < 1, late
