"""The truth table of docs/health.md, with shortened deadlines: what each fault shows on the port and in discovery, and how soon.

One node for all rows: its engine is never restarted. Rows that other modules show are named in docs/health.md.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness import Node, instances, wait_for
from tests.node.conftest import MODEL
from tests.streams import FOREVER, Streams

WAIT, TIMEOUT, STALL = 1, 1, 3
DEADLINES = {
    "DYN_CANARY_WAIT_TIME": str(WAIT),
    "DYN_HEALTH_CHECK_REQUEST_TIMEOUT": str(TIMEOUT),
    "DYN_HEALTH_CHECK_BUSY_STALL": str(STALL),
}
SERVING = (200, 200, 200, 1)
OUT = (200, 503, 503, 0)
"""Status of /live, /ready, /health, and how many workers discovery has: alive, and nobody is sent here."""


@pytest.fixture(scope="module")
def node(model: Path) -> Iterator[Node]:
    dials = "step_seconds=0.05"
    with Node(str(model), "--served-model-name", MODEL, "--synthetic", dials, "--drain-grace", "0", env=DEADLINES) as node:
        yield node.start().wait_ready(40)


@pytest.fixture
def flowing(node: Node) -> Iterator[Streams]:
    """Two streams that go on during the fault."""
    with Streams() as streams:
        streams.flowing(streams.start(node.url, MODEL, 2, FOREVER))
        yield streams


def status_of(node: Node, path: str) -> int:
    try:
        with urllib.request.urlopen(f"{node.system_url}{path}", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def look(node: Node) -> tuple[int, int, int, int]:
    live, ready, health = (status_of(node, path) for path in ("/live", "/ready", "/health"))
    return live, ready, health, len(instances(node))


def route(node: Node, path: str, **body: object) -> None:
    request = urllib.request.Request(f"{node.system_url}/engine/{path}", json.dumps(body).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["status"] == "ok"


def gauge(node: Node, name: str) -> float:
    with urllib.request.urlopen(f"{node.system_url}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"sgnode_{name}{{")))


def strikes(node: Node) -> int:
    return (node.runtime_dir / "log" / "prober.log").read_text().count(" (1 of 2)")


def same_engine(node: Node) -> None:
    wait_for("serving again", lambda: look(node) == SERVING, 10)
    assert node.wait_ready(10).status()["incarnation"] == 1


def test_idle(node: Node) -> None:
    """Canaries come at their interval, each a step, and nothing else happens."""
    steps, before = gauge(node, "scheduler_steps"), strikes(node)
    wait_for("two more canaries", lambda: gauge(node, "scheduler_steps") >= steps + 2, 5)
    assert look(node) == SERVING and strikes(node) == before
    with urllib.request.urlopen(f"{node.system_url}/health", timeout=5) as answer:
        endpoints = json.load(answer)["endpoints"]
    assert endpoints == dict.fromkeys(("generate", "load_lora", "unload_lora", "list_loras", "clear_kv_blocks"), "ready")


def test_256_streams(node: Node) -> None:
    before = strikes(node)
    with Streams() as streams:
        streams.start(node.url, MODEL, 256, 40)
        seen = {look(node) for _ in range(10)}
        assert all(r.complete for r in streams.join(60))
    assert seen == {SERVING} and strikes(node) == before


QUIET = {
    # Longer than canary_wait and two canaries; the step is longer than a canary's time and shorter than the stall limit.
    "prefill": 5.0,
    "step": 2.5,
    "update": 5.0,
}


@pytest.mark.parametrize("kind", QUIET)
def test_work_without_a_token_is_no_fault(node: Node, flowing: Streams, kind: str) -> None:
    before, seconds = strikes(node), QUIET[kind]
    tokens = set()
    with ThreadPoolExecutor(1) as pool:
        asked: Future[None] = pool.submit(route, node, "fault", kind=kind, seconds=seconds)
        began, seen = time.monotonic(), set()
        while time.monotonic() - began < seconds:
            seen.add(look(node))
            if 1.5 < time.monotonic() - began < seconds - 0.5:  # what came before has been counted by now
                tokens.add(gauge(node, "tokens"))
            time.sleep(0.1)
        asked.result()
    assert seen == {SERVING} and strikes(node) == before
    assert len(tokens) == 1, f"the fault did not work: {tokens}"
    wait_for("tokens again", lambda: gauge(node, "tokens") > max(tokens), 5)


LOUD: dict[str, tuple[float, str]] = {
    # Seconds at most to be out of discovery, and the reason.
    "deadlock": (WAIT + 2 * TIMEOUT, "the scheduler made no step for"),
    "step": (STALL + TIMEOUT, "the scheduler is in one step for"),
    "lost": (2 * TIMEOUT, "none came out of the engine"),
    "loop": (TIMEOUT, "event loop has not turned for"),
}


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
@pytest.mark.parametrize("kind", LOUD)
def test_a_fault_is_out_of_discovery_and_back_when_it_is_over(
    node: Node, request: pytest.FixtureRequest, figures: Callable[..., None], kind: str, busy: bool
) -> None:
    if busy:
        request.getfixturevalue("flowing")
    bound, words = LOUD[kind]
    seconds = bound + (WAIT + TIMEOUT if not busy else 0) + 3.5
    route(node, "fault", kind=kind, seconds=seconds)
    began = time.monotonic()
    wait_for("out of discovery", lambda: not instances(node), seconds)
    out = time.monotonic() - began
    assert look(node) == OUT
    status = wait_for("its kill announced", lambda: "its kill in" in node.status()["waiting_for"] and node.status(), 5)
    assert status["state"] == "unhealthy" and words in status["reason"], status
    wait_for("back in discovery", lambda: instances(node), 15)
    back = time.monotonic() - began - seconds
    figures(fault=kind, busy=busy, withdrawn_s=round(out, 2), back_s=round(back, 2))
    # An idle engine's fault shows by the next canary, a step's by the canary's own step.
    assert out < bound + (0 if busy else WAIT + TIMEOUT) + 2.5, f"{out:.1f} s"
    assert back < 3
    same_engine(node)


@pytest.mark.parametrize(
    ("there", "back", "state"),
    [
        ("pause_generation", "continue_generation", "paused"),
        ("release_memory_occupation", "resume_memory_occupation", "sleeping"),
    ],
)
def test_paused_and_asleep(node: Node, there: str, back: str, state: str) -> None:
    before = strikes(node)
    route(node, there)
    wait_for("out", lambda: look(node) == OUT and node.status()["state"] == state, 5)
    steps, began = gauge(node, "scheduler_steps"), time.monotonic()
    while time.monotonic() - began < WAIT + 2 * TIMEOUT:
        assert node.status()["state"] == state and look(node) == OUT
        time.sleep(0.1)
    assert gauge(node, "scheduler_steps") <= steps + 1, "canaries rest; one was just out"
    route(node, back)
    same_engine(node)
    assert strikes(node) == before


def test_draining(node: Node, flowing: Streams) -> None:
    before = strikes(node)
    assert node.sgnode("drain", "--no-wait").returncode in (0, 2)
    wait_for("out", lambda: not instances(node), 5)
    wait_for("draining", lambda: node.status()["state"] == "draining" and look(node) == OUT, 5)
    assert node.sgnode("resume").returncode == 0
    same_engine(node)
    assert strikes(node) == before and all(not r.ended for r in flowing.results)


def test_a_slow_load_outlasts_every_deadline(model: Path) -> None:
    dials = "load_seconds=6"
    flags = ("--served-model-name", MODEL, "--synthetic", dials, "--hang-timeout", "2", "--no-frontend")
    with Node(str(model), *flags, env=DEADLINES) as node:
        node.start()
        wait_for("loading", lambda: node.status().get("state") == "loading", 20)
        seen = set()
        while node.status().get("state") == "loading":
            seen.add(look(node))
            time.sleep(0.1)
        assert seen == {OUT}
        wait_for("serving", lambda: look(node) == SERVING, 10)
        assert node.status()["incarnation"] == 1
