"""Engine controls of a real node: pause, sleep, weights, profile, taints; bodies as dynamo.sglang 1.6.1's, discovery follows."""

import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.e2e.conftest import MODEL
from tests.harness import CPU, ONE_THREAD, Node, instances, model_cards, send, wait_for
from tests.streams import Result, Streams

TOKENS = 800
"""A second or more."""
LONG = 2000
PROMPT = [20, 30, 40]
OK = {"status": "ok"}
PAUSE, CONTINUE = "pause_generation", "continue_generation"
RELEASE, RESUME = "release_memory_occupation", "resume_memory_occupation"
DISK = "control/update_weights_from_disk"
VERSION = "control/update_weight_version"
TAINTS = "update/model_taints"
LOOKS = "control/is_scaling_elastic_ep"
ELASTIC = {"status": "error", "message": "elastic EP is not enabled (set --elastic-ep-backend)"}
UPDATED = {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}
ROUTES = ["--engine-route", "flush_cache:tm"]


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Node]:
    with Node(str(model), "--served-model-name", MODEL, *CPU, *ROUTES, "--drain-grace", "1", env=ONE_THREAD) as node:
        yield node.start().wait_ready(240)


@pytest.fixture
def node(served: Node) -> Iterator[Node]:
    """It serves before each test, and whatever a failed one left is undone after it."""
    before = served.status()["incarnation"]
    serves(served)
    yield served
    if served.status().get("state") != "ready":
        for path in (RESUME, CONTINUE):
            control(served, path)
    assert served.status()["incarnation"] == before, "no control may cost the engine its life"


def control(node: Node, path: str, body: Any = None, *, seconds: float = 120.0) -> tuple[int, Any]:
    """Status and body, which is JSON in plain text."""
    answer = requests.post(f"{node.system_url}/engine/{path}", json={} if body is None else body, timeout=seconds)
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    return answer.status_code, answer.json()


def failed(words: str) -> tuple[int, dict[str, str]]:
    """What Dynamo makes of a handler's exception."""
    return 500, {"error": "Handler error", "message": f"Python callback failed: {words}"}


def serves(node: Node) -> None:
    """Wait until it is in discovery and its frontend knows it."""
    wait_for("the instance", lambda: len(instances(node)) == 1, 30)
    node.wait_ready(60)
    wait_for("an answer", lambda: complete(node, 1).status_code == 200, 30)


def left(node: Node, state: str) -> None:
    """Wait until it is out of discovery, and says why."""
    wait_for("the instance gone", lambda: not instances(node), 30)
    wait_for(state, lambda: node.status().get("state") == state, 30)
    wait_for("requests refused", lambda: complete(node, 1).status_code == 503, 30)
    assert cards(node), "the model card stays"


def complete(node: Node, tokens: int) -> requests.Response:
    body: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return requests.post(f"{node.url}/v1/completions", json=body, timeout=60)


def text(node: Node) -> str:
    answer = complete(node, 24)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def cards(node: Node) -> list[dict[str, Any]]:
    return [card for _, card in model_cards(node.runtime_dir / "discovery")]


def flowing(streams: Streams, node: Node, tokens: int = TOKENS) -> Result:
    """A stream that has begun."""
    result = streams.start(node.url, MODEL, 1, tokens, temperature=0)[0]
    streams.flowing([result], 60)
    return result


def whole(result: Result, tokens: int = TOKENS) -> None:
    assert result.complete and result.tokens == tokens, result


# --- pause and continue ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
def test_a_paused_node_leaves_discovery_and_comes_back(node: Node, streams: Streams, mode: str) -> None:
    [undisturbed] = streams.start(node.url, MODEL, 1, TOKENS, temperature=0)
    streams.join()
    result = flowing(streams, node)
    assert control(node, PAUSE, {"mode": mode}) == (200, OK)
    left(node, "paused")
    assert "continue_generation" in node.status()["waiting_for"]
    assert control(node, PAUSE, {"mode": mode}) == (200, OK), "a second one is no error"
    assert not instances(node) and node.status()["state"] == "paused"
    if mode == "abort":
        streams.join()
        assert not result.complete and "503" in result.error, result
    else:
        assert not result.ended
    assert control(node, CONTINUE) == (200, OK)
    serves(node)
    streams.join()
    if mode != "abort":
        whole(result)
        assert "".join(result.text) == "".join(undisturbed.text)


def test_pause_without_a_mode_aborts_and_continue_without_a_pause_is_no_error(node: Node) -> None:
    assert control(node, CONTINUE) == (200, OK)
    assert requests.get(f"{node.system_url}/engine/{PAUSE}", timeout=60).json() == OK, "any method, no body"
    left(node, "paused")
    assert control(node, CONTINUE) == (200, OK)


def test_discovery_follows_after_an_error_too(node: Node) -> None:
    assert control(node, PAUSE, {"q": 1}) == failed("TypeError: Unexpected keyword argument 'q'")
    assert len(instances(node)) == 1
    assert control(node, PAUSE, {"mode": "retract"}) == (200, OK)
    assert control(node, "control/stop_profile")[0] == 500
    left(node, "paused")
    assert control(node, CONTINUE, {"q": 1}) == failed("TypeError: Unexpected keyword argument 'q'")
    assert not instances(node)
    assert control(node, CONTINUE) == (200, OK)


def test_an_agent_that_comes_back_to_a_paused_engine_stays_out_of_discovery(node: Node) -> None:
    assert control(node, PAUSE, {"mode": "retract"}) == (200, OK)
    left(node, "paused")
    old = node.pid("agent:0")
    send(old, signal.SIGKILL)
    wait_for("another agent that waits", lambda: "paused" in waiting(node, old), 60)
    assert not instances(node)
    assert control(node, CONTINUE) == (200, OK)


def waiting(node: Node, old: int) -> str:
    row = node.process_row("agent:0")
    return str(row["waiting_for"]) if row.get("pid") not in (None, 0, old) else ""


# --- memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_not_released_under_a_running_stream(node: Node, streams: Streams) -> None:
    result = flowing(streams, node)
    refused = failed("ValueError: 1 requests are running; drain first, or use `sgnode sleep`")
    assert control(node, RELEASE) == refused
    assert len(instances(node)) == 1
    assert control(node, PAUSE, {"mode": "in_place"}) == (200, OK)
    assert control(node, RELEASE) == refused
    assert control(node, CONTINUE) == (200, OK)
    streams.join()
    whole(result)


def test_released_memory_takes_the_node_out_of_discovery_until_it_is_back(node: Node) -> None:
    before = text(node)
    assert control(node, RELEASE) == (200, OK)
    left(node, "sleeping")
    assert "sgnode wake" in node.status()["waiting_for"]
    assert control(node, RELEASE) == (200, OK), "again is no error"
    status, body = control(node, RESUME, {"tags": ["zzz"]})
    assert status == 500 and body["message"].startswith("Python callback failed: ValueError: tags: expected a list of"), body
    assert control(node, RESUME) == (200, OK)
    serves(node)
    assert text(node) == before
    assert control(node, RESUME) == (200, OK), "nothing is to be done"


def test_a_retracted_stream_outlives_released_memory(node: Node, streams: Streams) -> None:
    result = flowing(streams, node)
    assert control(node, PAUSE, {"mode": "retract"}) == (200, OK)
    assert control(node, RELEASE) == (200, OK)
    left(node, "sleeping")
    assert control(node, RESUME) == (200, OK)
    wait_for("paused", lambda: node.status().get("state") == "paused", 30)
    assert not instances(node), "it is paused still"
    assert control(node, CONTINUE) == (200, OK)
    serves(node)
    streams.join()
    whole(result)


def test_sleep_waits_for_streams_and_wake_serves_again(node: Node, streams: Streams) -> None:
    result = flowing(streams, node)
    asleep = node.sgnode("sleep")
    assert asleep.returncode == 0 and "asleep; `sgnode wake`" in asleep.stdout, asleep
    streams.join()
    whole(result)
    left(node, "sleeping")
    again = node.sgnode("sleep")
    assert again.returncode == 0 and "asleep already" in again.stdout, again
    awake = node.sgnode("wake")
    assert awake.returncode == 0 and "awake and ready" in awake.stdout, awake
    assert node.status()["want"] == "serve"
    serves(node)
    assert node.sgnode("wake").returncode == 0


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    from safetensors.torch import load_file, save_file

    path = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(model, path)
    weights = load_file(path / "model.safetensors")
    flipped = {name: -tensor if "lm_head" in name else tensor for name, tensor in weights.items()}
    assert any("lm_head" in name for name in flipped)
    save_file(flipped, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_weights_are_replaced_from_disk_and_back(node: Node, model: Path, other_model: Path) -> None:
    before = text(node)
    assert control(node, DISK, {"model_path": str(other_model)}) == (200, UPDATED)
    assert text(node) != before
    versioned = {**UPDATED, "message": "Succeeded to update model weights. Weight version updated to v7."}
    assert control(node, DISK, {"model_path": str(model), "weight_version": "v7"}) == (200, versioned)
    assert text(node) == before
    status, body = control(node, DISK, {"model_path": "/nowhere"})
    assert status == 200 and body["success"] is False and "/nowhere" in body["message"]
    assert text(node) == before
    assert control(node, DISK) == failed("TypeError: Missing required argument 'model_path'")


def test_the_weight_version_is_set(node: Node) -> None:
    said = {"success": True, "message": "Weight version updated to v9", "new_version": "v9"}
    assert control(node, VERSION, {"new_version": "v9"}) == (200, said)
    assert control(node, VERSION) == failed("TypeError: Missing required argument 'new_version'")
    assert control(node, VERSION, {"q": 1}) == failed("TypeError: Unexpected keyword argument 'q'")


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        (PAUSE, {"mode": "zzz"}, "mode"),
        (DISK, {"model_path": "/nowhere", "load_format": "nope"}, "load_format"),
        ("control/start_profile", {"num_steps": "x"}, "num_steps"),
        (RELEASE, {"tags": 5}, "tags"),
        (RELEASE, {"tags": ["zzz"]}, "tags"),
    ],
)
def test_what_would_end_the_scheduler_is_refused(node: Node, path: str, body: dict[str, Any], named: str) -> None:
    status, said = control(node, path, body)
    assert status == 500 and said["message"].startswith(f"Python callback failed: ValueError: {named}: "), said
    assert len(instances(node)) == 1 and complete(node, 2).status_code == 200


# --- profile, taints, routes of one's own ----------------------------------------------------------------------------


def test_a_profile_is_written(node: Node, tmp_path: Path) -> None:
    start, stop = "control/start_profile", "control/stop_profile"
    idle = failed("RuntimeError: Profiling is not in progress. Call /start_profile first.")
    assert control(node, stop) == idle
    assert control(node, start, {"nope": 1}) == failed("TypeError: Unexpected keyword argument 'nope'")
    assert control(node, start, {"output_dir": str(tmp_path)}) == (200, {"status": "ok", "message": "Profiling started"})
    text(node)
    assert control(node, stop) == (200, {"status": "ok", "message": "Profiling stopped"})
    assert [path.stat().st_size > 0 for path in tmp_path.glob("*.trace.json.gz")] == [True]
    assert control(node, stop) == idle


def taints(node: Node) -> list[list[str]]:
    return [card["card_json"]["runtime_config"].get("taints") or [] for card in cards(node)]


def test_taints_reach_the_model_card(node: Node) -> None:
    assert control(node, TAINTS, {"taints": ["b", "a", "a"]}) == (200, {"status": "ok", "taints": ["a", "b"]})
    wait_for("taints on the card", lambda: taints(node) == [["a", "b"]], 30)
    wrong = failed("ValueError: 'taints' must be a JSON array of strings")
    assert [control(node, TAINTS, body) for body in ({"taints": "a"}, {"taints": [1]}, {})] == [wrong] * 3
    reserved = "ValueError: taint 'dynamo.topology/zone' uses reserved prefix 'dynamo.topology/'"
    assert control(node, TAINTS, {"taints": ["dynamo.topology/zone"]}) == failed(reserved)
    assert control(node, TAINTS, [1]) == failed("ValueError: request body must be a JSON object")
    assert taints(node) == [["a", "b"]]
    assert control(node, TAINTS, {"taints": []}) == (200, {"status": "ok", "taints": []})
    wait_for("no taints on the card", lambda: taints(node) == [[]], 30)


def test_a_route_of_ones_own_answers(node: Node, streams: Streams) -> None:
    flushed = {"rid": None, "http_worker_ipc": None, "success": True, "message": ""}
    assert control(node, "flush_cache") == (200, flushed)
    result = flowing(streams, node)
    assert control(node, "flush_cache") == (200, {**flushed, "success": False})
    streams.join()
    whole(result)


def test_what_is_no_route_is_told_apart(node: Node) -> None:
    for path in ("nope", "control/stop_profile/", "control/release_memory_occupation"):
        assert control(node, path) == (404, {"error": "Route not found", "message": f"Route /engine/{path} not found"})
    url = f"{node.system_url}/engine/{TAINTS}"
    malformed = requests.post(url, data=b"{bad", timeout=30)
    assert malformed.status_code == 400 and malformed.json()["error"] == "Invalid JSON"
    assert control(node, LOOKS) == (200, ELASTIC)


# --- whoever is alive, one after the other ---------------------------------------------------------------------------


def test_controls_answer_while_the_only_agent_is_dead(node: Node) -> None:
    old, record = node.pid("agent:0"), instances(node)
    send(old, signal.SIGKILL)
    assert control(node, TAINTS, {"taints": ["t"]}) == (200, {"status": "ok", "taints": ["t"]})
    assert set(instances(node)) <= set(record), "no other agent was there before the answer"
    wait_for("another agent", lambda: instances(node) not in ([], record), 60)
    serves(node)
    assert node.pid("agent:0") not in (0, old)
    # What was said meanwhile is on the new agent's card.
    wait_for("taints on the card", lambda: taints(node) == [["t"]], 30)
    control(node, TAINTS, {"taints": []})


def test_controls_run_one_after_the_other(node: Node, model: Path, streams: Streams) -> None:
    """Weights are replaced when the stream has ended. Until then another control/* has no answer; what looks or pauses has."""
    result = flowing(streams, node, LONG)
    said: dict[str, tuple[int, Any, float]] = {}

    def call(name: str, path: str, body: Any) -> None:
        said[name] = (*control(node, path, body), time.monotonic())

    weights = threading.Thread(target=call, args=("weights", DISK, {"model_path": str(model)}))
    weights.start()

    def is_held() -> bool:
        try:
            control(node, VERSION, {"new_version": "early", "abort_all_requests": False}, seconds=0.5)
        except requests.Timeout:
            return True
        return False

    wait_for("the first control at work", is_held, 30)
    late = {"new_version": "late", "abort_all_requests": False}
    second = threading.Thread(target=call, args=("version", VERSION, late))
    second.start()
    assert control(node, LOOKS) == (200, ELASTIC)
    assert control(node, PAUSE, {"mode": "retract"}) == (200, OK)
    left(node, "paused")
    assert not said, "both wait, the first for the stream and the second for the first"
    assert control(node, CONTINUE) == (200, OK)
    assert not result.ended
    streams.join()
    for thread in (weights, second):
        thread.join(60)
    whole(result, LONG)
    assert said["weights"][:2] == (200, UPDATED)
    assert said["version"][0] == 200 and said["version"][1]["new_version"] == "late"
    assert min(at for *_, at in said.values()) > result.ended, "neither was answered before the stream's end"
