"""The truth table of docs/health.md with a real SGLang of two DP ranks, and with shortened deadlines.

Faults are put into the real processes from outside: SIGSTOP, or their main thread held by tests/holding.
"""

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import MODEL
from tests.frontend import free_port
from tests.harness import CPU, TWO_RANKS, Node, instances, process_state, send, wait_for
from tests.holding.sitecustomize import HOLD
from tests.node.test_hang import titled
from tests.node.test_health import OUT, SERVING, look, route, strikes
from tests.streams import Streams

WAIT, TIMEOUT, STALL = 1, 2, 8
DEADLINES = {
    "DYN_CANARY_WAIT_TIME": str(WAIT),
    "DYN_HEALTH_CHECK_REQUEST_TIMEOUT": str(TIMEOUT),
    "DYN_HEALTH_CHECK_BUSY_STALL": str(STALL),
}
GENERATE = {"DYN_SGLANG_ENABLE_GENERATE": "1"}
"""The frontend offers SGLang's own generate as well."""
CHUNK = 64


@pytest.fixture(scope="module")
def node(model: Path) -> Iterator[Node]:
    events = {"publisher": "zmq", "topic": "", "endpoint": f"tcp://*:{free_port()}"}
    flags = [
        "--dp-size", "2", "--chunked-prefill-size", str(CHUNK), "--engine-route", "slow_down:tm", "--enable-metrics",
        "--kv-events-config", json.dumps(events),
    ]  # fmt: skip
    env = {"PYTHONPATH": str(Path("tests/holding").absolute()), **TWO_RANKS, **DEADLINES, **GENERATE}
    node = Node(str(model), "--served-model-name", MODEL, *CPU, *flags, env=env)
    node.environment["SGNODE_TEST_HOLD"] = str(node.root / "hold")
    with node:
        yield node.start().wait_ready(240)


@pytest.fixture
def hold(node: Node) -> Iterator[Callable[[int], None]]:
    """Holds the main thread of a process until the test is over; the returned function lets go by ``hold(0)``."""
    file = Path(node.environment["SGNODE_TEST_HOLD"])

    def held(pid: int) -> None:
        if not pid:
            file.unlink(missing_ok=True)
            return
        file.touch()
        os.kill(pid, HOLD)
        wait_for("the main thread held", lambda: file.with_name(f"hold.{pid}").exists(), 15)

    yield held
    held(0)


def gauges(node: Node, name: str) -> dict[str, float]:
    """By DP rank."""
    found = {}
    for line in metrics(node):
        if line.startswith(f"sgnode_{name}{{"):
            found[line.partition('dp_rank="')[2].partition('"')[0]] = float(line.split()[-1])
    return found


def metrics(node: Node) -> list[str]:
    with urllib.request.urlopen(f"{node.system_url}/metrics", timeout=5) as answer:
        return list(answer.read().decode().splitlines())


def counted(node: Node) -> float:
    """Tokens in SGLang's own histogram of inter-token latencies."""
    name = "sglang:inter_token_latency_seconds_count"
    return sum(float(line.split()[-1]) for line in metrics(node) if line.startswith(name))


def post(url: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: bytes = answer.read()
        return found


def back_in_discovery(node: Node, pid: int) -> None:
    wait_for("serving again", lambda: look(node) == SERVING, 20)
    assert node.wait_ready(10).status()["incarnation"] == 1 and node.pid("engine") == pid


def test_an_idle_engine_gets_a_canary_on_each_rank_and_both_say_their_kv_use(node: Node) -> None:
    before, quiet = gauges(node, "scheduler_steps"), strikes(node)
    assert set(before) == {"0", "1"}, "a scheduler is not counted"
    wait_for("two more canaries on each", lambda: all(n >= before[r] + 2 for r, n in gauges(node, "scheduler_steps").items()), 20)
    loops = gauges(node, "scheduler_loops")
    wait_for("both loops turn", lambda: all(n > loops[r] for r, n in gauges(node, "scheduler_loops").items()), 5)
    outputs = gauges(node, "scheduler_outputs")
    assert all(outputs.values()), outputs
    # With pure data parallelism SGLang gives each rank an address of its own, which nobody would read.
    assert wait_for("KvUse of both ranks", lambda: set(gauges(node, "kv_total_blocks")) == {"0", "1"}, 10)
    assert look(node) == SERVING and strikes(node) == quiet


def test_256_streams(node: Node) -> None:
    quiet = strikes(node)
    with Streams() as streams:
        results = streams.start(node.url, MODEL, 256, 8)
        seen = set()
        while any(not r.ended for r in results):
            seen.add(look(node))
            time.sleep(0.2)
        assert all(r.complete for r in streams.join()), [r for r in results if not r.complete][:2]
    assert seen == {SERVING} and strikes(node) == quiet


@pytest.mark.parametrize(("sleep", "prompt"), [(0.5, 15 * CHUNK), (5.0, 10)], ids=["chunks", "one step"])
def test_a_prefill_longer_than_every_deadline_is_no_fault(node: Node, sleep: float, prompt: int) -> None:
    """SGLang's own dial makes each step slow; a chunk is a step."""
    quiet, steps = strikes(node), gauges(node, "scheduler_steps")
    route(node, "slow_down", forward_sleep_time=sleep)
    try:
        with Streams() as streams:
            (result,) = streams.start(node.url, MODEL, 1, 1, prompt=[7] * prompt)
            seen = set()
            while not result.ended:
                seen.add(look(node))
                time.sleep(0.2)
            assert result.complete, result
    finally:
        route(node, "slow_down", forward_sleep_time=0.0)
    took = result.ended - result.started
    print(f"{took:.1f} s without a token, {gauges(node, 'scheduler_steps')} steps after {steps}")
    assert took > WAIT + TIMEOUT and seen == {SERVING}
    assert strikes(node) == quiet, (node.runtime_dir / "log" / "prober.log").read_text()[-900:]


FAULTS = {
    # Who, how soon at most, and the reason.
    "scheduler": ("sglang::scheduler_DP1", WAIT + 2 * TIMEOUT, "DP rank 1"),
    "detokenizer": ("sglang::detokenizer", WAIT + 2 * TIMEOUT, "none came out of the engine"),
    "engine": ("", TIMEOUT, "event loop has not turned"),
}


@pytest.mark.parametrize("who", FAULTS)
def test_a_process_that_lives_and_does_nothing(
    node: Node, hold: Callable[[int], None], figures: Callable[..., None], who: str
) -> None:
    title, bound, words = FAULTS[who]
    engine = node.pid("engine")
    wait_for("serving", lambda: look(node) == SERVING, 20)
    hold(titled(node, title) if title else engine)
    began = time.monotonic()
    wait_for("out of discovery", lambda: not instances(node), bound + 10)
    out = time.monotonic() - began
    assert look(node) == OUT
    status = wait_for("unhealthy", lambda: node.status()["state"] == "unhealthy" and node.status(), 5)
    assert words in status["reason"], status
    hold(0)
    let_go = time.monotonic()
    wait_for("back in discovery", lambda: instances(node), 20)
    figures(held=who, withdrawn_s=round(out, 2), back_s=round(time.monotonic() - let_go, 2))
    assert out < bound + 4
    back_in_discovery(node, engine)


@pytest.mark.parametrize("title", ["sglang::scheduler_DP1", "sglang::detokenizer"])
def test_a_process_that_is_stopped(node: Node, figures: Callable[..., None], title: str) -> None:
    engine, pid = node.pid("engine"), titled(node, title)
    send(pid, signal.SIGSTOP)
    began = time.monotonic()
    wait_for("out of discovery", lambda: not instances(node), 10)
    out = time.monotonic() - began
    assert look(node) == OUT
    wait_for("who it is", lambda: f"pid {pid}" in node.status()["reason"], 5)
    send(pid, signal.SIGCONT)
    let_go = time.monotonic()
    wait_for("back in discovery", lambda: instances(node), 20)
    figures(stopped=title, withdrawn_s=round(out, 2), back_s=round(time.monotonic() - let_go, 2))
    assert out < 3
    back_in_discovery(node, engine)


def test_tokens_need_no_detokenizer(node: Node) -> None:
    """Streams that run go on, and their metrics count, while it is stopped; nothing of them went through it."""
    engine, pid = node.pid("engine"), titled(node, "sglang::detokenizer")
    before = counted(node)
    with Streams() as streams:
        results = streams.start(node.url, MODEL, 4, 1_000)
        streams.flowing(results)
        send(pid, signal.SIGSTOP)
        try:
            assert all(r.complete and r.tokens == 1_000 for r in streams.join()), results
            assert process_state(pid) == "T"
        finally:
            send(pid, signal.SIGCONT)
    # SGLang's own histogram: each token but the first.
    assert counted(node) - before >= 4 * 999
    back_in_discovery(node, engine)


def test_a_detokenizer_that_hangs_beside_tokens_that_need_it_not(node: Node, hold: Callable[[int], None]) -> None:
    """One engine-native request needs it; what else runs goes on."""
    engine = node.pid("engine")
    body = {"model": MODEL, "input_ids": [20, 30], "sampling_params": {"max_new_tokens": 4}, "stream": True}
    with Streams() as streams, ThreadPoolExecutor() as pool:
        results = streams.start(node.url, MODEL, 8, 3_000)
        streams.flowing(results)
        hold(titled(node, "sglang::detokenizer"))
        native = pool.submit(post, f"{node.url}/generate", body)
        status = wait_for("unhealthy", lambda: node.status()["state"] == "unhealthy" and node.status(), 2 * TIMEOUT + 10)
        assert "gives none back" in status["reason"] and not native.done(), status
        assert any(not r.ended for r in results), "the streams were too short to show anything"
        hold(0)
        assert b"[DONE]" in native.result(30)
        streams.join()
        said = [(r.tokens, r.chunks, r.error, r.ended - r.started) for r in results]
        assert all(r.complete and r.tokens == 3_000 for r in results), said
    back_in_discovery(node, engine)
