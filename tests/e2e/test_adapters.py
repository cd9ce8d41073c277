"""LoRA adapters of a real node: loaded and unloaded by HTTP and by Dynamo, equal to the engine called directly, kept."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.e2e.conftest import MODEL
from tests.e2e.direct import Call, direct
from tests.e2e.endpoint import ask
from tests.harness import CPU, ONE_THREAD, SGNODE, Node, model_cards, send, wait_for

ADAPTER = "tuned"
AGENTS = 2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
FLAGS = ["--enable-lora", "--lora-backend", "torch_native", "--max-lora-rank", "8", "--lora-target-modules", *TARGETS]
PROMPTS = [[20, 30, 40], [50, 60, 70, 80, 90], [100, 110]]
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def lora_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "demo-lora"
    subprocess.run([SGNODE, "demo-model", str(path), "--lora"], check=True, capture_output=True, timeout=120)
    return path


@pytest.fixture(scope="module")
def reference(lora_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[int]]]:
    """The engine's own greedy tokens for PROMPTS, by the name of the model."""
    params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    calls: list[Call] = [("load_lora_adapter", {"lora_name": ADAPTER, "lora_path": str(lora_model / "adapter")})]
    for adapter in (None, ADAPTER):
        calls += [("generate", {"input_ids": ids, "sampling_params": params, "lora_path": adapter}) for ids in PROMPTS]
    loaded, *answers = direct(lora_model, FLAGS, calls, tmp_path_factory.mktemp("direct"))
    assert loaded
    found = {MODEL: answers[: len(PROMPTS)], ADAPTER: answers[len(PROMPTS) :]}
    assert all(base != tuned for base, tuned in zip(*found.values(), strict=True)), "the adapter must be heard"
    return found


@pytest.fixture(scope="module")
def node(lora_model: Path, reference: dict[str, list[list[int]]]) -> Iterator[Node]:
    arguments = [str(lora_model), "--served-model-name", MODEL, *CPU, *FLAGS, "--agents", str(AGENTS)]
    with Node(*arguments, env={**ONE_THREAD, "DYN_LORA_ENABLED": "true"}) as node:
        yield node.start().wait_ready(240)


def loras(node: Node, method: str, name: str = "", **body: Any) -> requests.Response:
    url = f"{node.system_url}/v1/loras" + (f"/{name}" if name else "")
    return requests.request(method, url, json=body or None, timeout=120)


def load(node: Node, model: Path, name: str = ADAPTER) -> dict[str, Any]:
    answer = loras(node, "POST", lora_name=name, source={"uri": f"file://{model / 'adapter'}"})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def models(node: Node) -> set[str]:
    return {model["id"] for model in requests.get(f"{node.url}/v1/models", timeout=5).json()["data"]}


def cards(node: Node, name: str = ADAPTER) -> list[dict[str, Any]]:
    """The adapter's model cards in the node's file store, one of each agent."""
    return [card for key, card in model_cards(node.runtime_dir / "discovery") if key.endswith(f"/{name}")]


def listed(node: Node, name: str = ADAPTER, *, there: bool = True) -> None:
    """Wait until every agent has the adapter's card in discovery and the frontend knows it; or none."""
    wait_for(f"cards of {name}", lambda: len(cards(node, name)) == (AGENTS if there else 0), 60)
    wait_for(f"{name} in /v1/models", lambda: (name in models(node)) == there, 60)


def answers(node: Node, model: str) -> list[list[int]]:
    """The tokens of greedy completions, by their ids."""
    found = []
    for ids in PROMPTS:
        body: dict[str, Any] = {"model": model, "prompt": ids, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        body |= {"logprobs": 0, "return_tokens_as_token_ids": True}
        answer = requests.post(f"{node.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        tokens = answer.json()["choices"][0]["logprobs"]["tokens"]
        found.append([int(token.removeprefix("token_id:")) for token in tokens])
    return found


def store(node: Node) -> Path:
    return node.runtime_dir / "discovery"


def test_an_adapter_is_loaded_over_http_and_answers_as_the_engines_own(
    node: Node, lora_model: Path, reference: dict[str, list[list[int]]]
) -> None:
    assert loras(node, "GET").json() == {"status": "success", "loras": {}, "count": 0}
    assert answers(node, MODEL) == reference[MODEL]
    said = load(node, lora_model)
    assert said.pop("lora_id") > 0
    assert said == {
        "status": "success",
        "message": f"LoRA adapter '{ADAPTER}' loaded successfully",
        "lora_name": ADAPTER,
    }
    listed(node)
    assert models(node) == {MODEL, ADAPTER}
    # Both agents serve it: the frontend takes turns.
    for _ in range(AGENTS):
        assert answers(node, ADAPTER) == reference[ADAPTER]
        assert answers(node, MODEL) == reference[MODEL]


def test_both_agents_publish_the_card(node: Node, lora_model: Path) -> None:
    number = load(node, lora_model)["lora_id"]
    listed(node)
    found = cards(node)
    assert len({card["instance_id"] for card in found}) == AGENTS
    for card in found:
        assert card["model_suffix"] == ADAPTER
        content = card["card_json"]
        assert content["display_name"] == ADAPTER and content["source_path"] == str(lora_model)
        assert content["lora"]["name"] == ADAPTER
        assert content["user_data"] == {"lora_adapter": True, "lora_id": number}


def test_the_list_has_it_and_a_second_load_changes_nothing(node: Node, lora_model: Path) -> None:
    number = load(node, lora_model)["lora_id"]
    assert loras(node, "GET").json() == {"status": "success", "loras": {ADAPTER: number}, "count": 1}
    again = load(node, lora_model)
    assert again == {
        "status": "success",
        "message": f"LoRA adapter '{ADAPTER}' already loaded",
        "lora_name": ADAPTER,
        "lora_id": number,
    }
    assert ask(store(node), "dynamo.backend.list_loras", {}) == [loras(node, "GET").json()]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("file:///nowhere/adapter", "Failed to download LoRA: Download failed: Local LoRA not found: file:///nowhere/adapter"),
        ("zz://x", "Failed to download LoRA: Download failed: LoRA zz://x not found in any source"),
    ],
)
def test_a_wrong_uri_is_an_error_and_leaves_nothing(node: Node, uri: str, message: str) -> None:
    before = models(node)
    answer = loras(node, "POST", lora_name="other", source={"uri": uri})
    assert (answer.status_code, answer.json()) == (500, {"status": "error", "message": message})
    assert models(node) == before and not cards(node, "other")
    assert "other" not in loras(node, "GET").json()["loras"]


def test_wrong_requests_are_refused_as_by_dynamo(node: Node) -> None:
    url = f"{node.system_url}/v1/loras"
    assert requests.post(url, data="lora_name=x", timeout=30).status_code == 415
    assert requests.post(url, data="{x", headers={"Content-Type": "application/json"}, timeout=30).status_code == 400
    missing = requests.post(url, json={"lora_name": "x"}, timeout=30)
    assert missing.status_code == 422 and "source" in missing.text
    unknown = requests.delete(f"{url}/zzz", timeout=30)
    assert unknown.status_code == 500 and unknown.json()["message"].startswith("LoRA adapter 'zzz' not found. Available LoRAs:")


def test_unloaded_it_is_gone_everywhere(node: Node, lora_model: Path, reference: dict[str, list[list[int]]]) -> None:
    number = load(node, lora_model)["lora_id"]
    listed(node)
    answer = loras(node, "DELETE", ADAPTER)
    assert (answer.status_code, answer.json()) == (
        200,
        {
            "status": "success",
            "message": f"LoRA adapter '{ADAPTER}' unloaded successfully",
            "lora_name": ADAPTER,
            "lora_id": number,
        },
    )
    listed(node, there=False)
    body: dict[str, Any] = {"model": ADAPTER, "prompt": [20, 30], "max_tokens": 2}
    assert requests.post(f"{node.url}/v1/completions", json=body, timeout=30).status_code == 404
    assert loras(node, "GET").json()["count"] == 0
    assert answers(node, MODEL) == reference[MODEL]


def test_dynamos_own_endpoints_load_and_unload_too(node: Node, lora_model: Path, reference: dict[str, list[list[int]]]) -> None:
    request = {"lora_name": ADAPTER, "source": {"uri": f"file://{lora_model / 'adapter'}"}}
    said = ask(store(node), "dynamo.backend.load_lora", request)
    assert len(said) == 1 and said[0]["message"] == f"LoRA adapter '{ADAPTER}' loaded successfully", said
    listed(node)
    assert answers(node, ADAPTER) == reference[ADAPTER]
    said = ask(store(node), "dynamo.backend.unload_lora", {"lora_name": ADAPTER})
    assert len(said) == 1 and said[0]["message"] == f"LoRA adapter '{ADAPTER}' unloaded successfully", said
    listed(node, there=False)


def test_an_adapter_with_the_models_own_name_is_undone(
    node: Node, lora_model: Path, reference: dict[str, list[list[int]]]
) -> None:
    request: dict[str, Any] = {"lora_name": MODEL, "source": {"uri": f"file://{lora_model / 'adapter'}"}}
    answer = loras(node, "POST", **request)
    said = answer.json()
    assert answer.status_code == 500 and (said["status"], said["lora_name"]) == ("error", MODEL), said
    assert said["message"].startswith(f"Failed to register LoRA '{MODEL}' in discovery registry:"), said
    assert ask(store(node), "dynamo.backend.load_lora", request) == [said]
    assert loras(node, "GET").json()["loras"] == {}
    assert answers(node, MODEL) == reference[MODEL]


def test_the_adapter_is_there_again_after_the_engines_death(
    node: Node, lora_model: Path, reference: dict[str, list[list[int]]]
) -> None:
    number = load(node, lora_model)["lora_id"]
    listed(node)
    before = node.status()["incarnation"]
    send(node.pid("engine"), signal.SIGKILL)
    wait_for("the death seen", lambda: node.status().get("state") != "ready", 20)
    wait_for("another engine", lambda: node.status().get("incarnation", 0) > before, 120)
    node.wait_ready(240)
    assert loras(node, "GET").json()["loras"] == {ADAPTER: number}
    listed(node)
    assert answers(node, ADAPTER) == reference[ADAPTER]
    assert answers(node, MODEL) == reference[MODEL]


def test_an_agent_that_comes_back_publishes_the_card_too(node: Node, lora_model: Path) -> None:
    load(node, lora_model)
    listed(node)
    row = node.process_row("agent:1")
    worker = int(row["detail"].removeprefix("worker "))
    send(row["pid"], signal.SIGKILL)
    # A dead agent's own records are removed by the node: Dynamo would keep them for some 8 s.
    wait_for("the dead agent's card gone", lambda: worker not in [card["instance_id"] for card in cards(node)], 5)
    listed(node)
    assert node.pid("agent:1") not in (0, row["pid"])
