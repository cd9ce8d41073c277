"""A real node serves real requests: curl, the openai client, tokens equal to the engine's own, cancellation, status."""

import concurrent.futures
import http.client
import itertools
import json
import re
import shlex
import subprocess
from typing import Any

import openai
import pytest
import requests

from tests import aborts
from tests.e2e.conftest import MODEL, NEW_TOKENS, PROMPTS
from tests.harness import Node, wait_for
from tests.streams import Streams


@pytest.fixture(scope="module")
def client(node: Node) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0)


def chat(client: openai.OpenAI, **more: Any) -> Any:
    messages = [{"role": "user", "content": "The quick brown fox"}]
    return client.chat.completions.create(model=MODEL, messages=messages, **more)  # type: ignore[call-overload]


def completion(client: openai.OpenAI, **more: Any) -> Any:
    return client.completions.create(model=MODEL, prompt="The quick brown fox", **more)


# --- the two ways in -------------------------------------------------------------------------------------------------


def test_the_curl_line_of_the_console_works_as_pasted(node: Node) -> None:
    lines = wait_for("curl line", lambda: re.findall(r"curl .*", node.console.read_text()), 10)
    done = subprocess.run(["bash", "-c", lines[0]], capture_output=True, text=True, timeout=60, check=True)
    events = [line[6:] for line in done.stdout.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]" and len(events) > 1
    assert json.loads(events[0])["object"] == "chat.completion.chunk"
    assert shlex.split(lines[0])[0] == "curl"


def test_chat_and_completions_streamed_and_not(client: openai.OpenAI) -> None:
    for create in (chat, completion):
        whole = create(client, max_tokens=64, temperature=0, extra_body={"ignore_eos": True})
        assert whole.usage.completion_tokens == 64 and whole.choices[0].finish_reason == "length"
        chunks = list(
            create(
                client,
                max_tokens=64,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
        )
        assert chunks[-1].usage.completion_tokens == 64
        assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
        texts = [c.choices[0] for c in chunks if c.choices]
        streamed = "".join((c.delta.content if create is chat else c.text) or "" for c in texts)
        assert streamed == (whole.choices[0].message.content if create is chat else whole.choices[0].text)
        assert len(texts) > 8, "tokens come one by one, not in one lump"


def test_sampling_is_honoured(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        done = completion(client, max_tokens=24, temperature=1.0, seed=seed, extra_body={"ignore_eos": True})
        return str(done.choices[0].text)

    # SGLang itself follows a seed only with --enable-deterministic-inference, which its CPU backends don't have.
    assert len({sample(seed) for seed in range(5)}) > 1
    several = completion(client, max_tokens=8, temperature=1.0, n=3, extra_body={"ignore_eos": True})
    assert sorted(choice.index for choice in several.choices) == [0, 1, 2]


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    # Without ignore_eos: with it Dynamo's frontend drops the stop strings too.
    greedy = completion(client, max_tokens=48, temperature=0).choices[0].text
    stop = next(c for c in greedy[4:] if c.isascii() and c.isprintable() and c not in greedy[:4])
    stopped = completion(client, max_tokens=48, temperature=0, stop=[stop])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == greedy[: greedy.index(stop)]
    assert stopped.usage.completion_tokens < 48


def test_a_bad_request_is_a_400_and_costs_nobody_else(client: openai.OpenAI, node: Node) -> None:
    before = node.pid("engine")
    for body in (
        {"model": MODEL, "prompt": [5] * 4096, "max_tokens": 8},
        {"model": MODEL, "prompt": [99_999], "max_tokens": 8},
        {"model": MODEL, "prompt": "x", "max_tokens": 8, "top_p": 7.0},
    ):
        answer = requests.post(f"{node.url}/v1/completions", json=body, timeout=30)
        assert answer.status_code == 400, answer.text
    assert completion(client, max_tokens=4).usage.completion_tokens >= 1
    assert node.pid("engine") == before and node.status()["state"] == "ready"


# --- the same tokens as the engine -----------------------------------------------------------------------------------


def greedy(node: Node, ids: list[int]) -> list[int]:
    """The tokens of a greedy completion, by their ids: text would hide what is no UTF-8."""
    body = {"model": MODEL, "prompt": ids, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    named = {**body, "logprobs": 0, "return_tokens_as_token_ids": True}
    answer = requests.post(f"{node.url}/v1/completions", json=named, timeout=60)
    assert answer.status_code == 200, answer.text
    return [int(token.removeprefix("token_id:")) for token in answer.json()["choices"][0]["logprobs"]["tokens"]]


def test_greedy_tokens_equal_the_engine_called_directly(node: Node, reference: list[list[int]]) -> None:
    assert [greedy(node, ids) for ids in PROMPTS] == reference
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda ids: greedy(node, ids), PROMPTS)) == reference


# --- cancellation ----------------------------------------------------------------------------------------------------


def open_stream(node: Node, tokens: int, request_id: str | None = None) -> requests.Response:
    body = {"model": MODEL, "prompt": [20, 30, 40], "max_tokens": tokens, "ignore_eos": True, "stream": True}
    headers = {"x-request-id": request_id} if request_id else {}
    answer = requests.post(f"{node.url}/v1/completions", json=body, headers=headers, stream=True, timeout=60)
    assert answer.status_code == 200
    return answer


def close_in_decode(node: Node) -> None:
    answer = open_stream(node, 3000)
    lines = answer.iter_lines()
    for _ in range(6):
        next(lines)
    answer.close()


def close_unanswered(node: Node, prompt: list[int]) -> None:
    """Send a request and leave as soon as the engine has it. It would last for seconds, so that its end is the abort."""
    connection = http.client.HTTPConnection(node.url.removeprefix("http://"))
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 2_000, "ignore_eos": True, "stream": True}
    known = aborts.submitted(node)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    wait_for("it is submitted", lambda: aborts.submitted(node) > known, 10, every=0.002)
    connection.close()


def test_a_closed_connection_ends_its_request_in_the_engine(node: Node) -> None:
    delays = aborts.delays(node, 20, lambda: close_in_decode(node))
    aborts.prompt("aborts in decode", delays)
    wait_for("nothing running", lambda: node.status()["inflight"] == 0, 10)


def test_a_request_whose_prompt_is_computed_is_ended_as_soon(node: Node) -> None:
    prompts = itertools.count(20)
    delays = aborts.delays(node, 10, lambda: close_unanswered(node, [next(prompts), *[30] * 2_000]))
    aborts.prompt("aborts in prefill", delays, step=0.2)
    wait_for("nothing running", lambda: node.status()["inflight"] == 0, 10)


def test_a_request_that_waits_behind_others_is_ended_as_soon(node: Node) -> None:
    with Streams() as running:
        running.start(node.url, MODEL, 64, 400)
        wait_for("as many as the engine runs", lambda: node.status()["inflight"] >= 64, 30)
        delays = aborts.delays(node, 5, lambda: close_unanswered(node, [20, 30, 40]))
        aborts.prompt("aborts in the queue", delays)
        assert node.status()["inflight"] >= 60, "the others still run"
        assert all(result.complete for result in running.join())


def test_ids_that_are_prefixes_of_one_another_do_not_hurt_each_other(node: Node) -> None:
    kept = [open_stream(node, 200, request_id) for request_id in ("a-10", "a-11", "a-1-1")]
    victim = open_stream(node, 3000, "a-1")
    lines = victim.iter_lines()
    for _ in range(4):
        next(lines)
    known = len(aborts.aborts(node))
    victim.close()
    wait_for("the victim's abort", lambda: aborts.aborts(node)[known:], 10)
    for answer in kept:
        events = [line for line in answer.iter_lines() if line.startswith(b"data: ")]
        assert events[-1] == b"data: [DONE]"
        choices = [choice for event in events[:-1] for choice in json.loads(event[6:])["choices"]]
        assert choices[-1].get("finish_reason") == "length"
    assert len(aborts.aborts(node)) == known + 1


# --- what the node says of itself ------------------------------------------------------------------------------------

DESIGN_KEYS = {
    "name", "version", "role", "node_rank", "state", "reason", "since", "registered", "epoch", "incarnation", "inflight",
    "ports", "processes",
}  # fmt: skip
ROW_KEYS = {"name", "pid", "state", "detail", "waiting_for", "uptime_s", "restarts", "rss_mb"}


def test_status_has_the_keys_of_the_design_and_every_process_its_memory(node: Node) -> None:
    document = node.status()
    assert document.keys() >= DESIGN_KEYS
    assert (document["state"], document["registered"], document["incarnation"]) == ("ready", True, 1)
    rows = {row["name"]: row for row in document["processes"]}
    assert rows.keys() >= {"coordinator", "relay", "engine", "keeper", "prober", "frontend", "agent:0"}
    for row in rows.values():
        assert row.keys() >= ROW_KEYS
        assert row["rss_mb"] > 5 and row["pid"] > 0
    print({name: row["rss_mb"] for name, row in rows.items()})
    logged = ["imports", "children", "init", "weights", "kv_cache"]
    startup = document["startup"]
    assert startup["done"] and list(startup["phases"]) == ["check", "processes", "keeper", *logged, "warm_up", "registered"]
    table = node.sgnode("status")
    assert table.returncode == 0 and f"start-up: {startup['seconds']:.1f} s = check" in table.stdout


IMPORTED = re.compile(r"^import time:\s+\d+ \|\s+\d+ \|\s+(\S+)$", re.MULTILINE)


def test_side_processes_import_what_the_design_allows(node: Node) -> None:
    """Every process logs its imports as it makes them (PYTHONPROFILEIMPORTTIME), until now."""
    forbidden = {"sglang", "torch", "transformers"}
    for process, more in {
        "agent-0": set(),
        "relay": {"pickle5", "aiohttp"},
        "prober": {"dynamo"},
        "coordinator": set(),
    }.items():
        text = (node.runtime_dir / "log" / f"{process}.log").read_text(errors="replace")
        packages = {name.partition(".")[0] for name in IMPORTED.findall(text)}
        assert {"zmq", "msgspec", "shared"} <= packages, f"{process}: the import log is there"
        assert not packages & (forbidden | more), process
    engine = (node.runtime_dir / "log" / "engine.log").read_text(errors="replace")
    assert "sglang" in {name.partition(".")[0] for name in IMPORTED.findall(engine)}, "the check itself works"


def test_health_and_metrics(node: Node) -> None:
    for path in ("/live", "/health", "/ready"):
        assert requests.get(node.system_url + path, timeout=5).status_code == 200, path
    assert requests.get(node.system_url + "/health", timeout=5).json()["status"] == "ready"
    text = requests.get(node.system_url + "/metrics", timeout=5).text
    assert "sgnode_" in text and "dynamo_component_" in text
    models = requests.get(f"{node.url}/v1/models", timeout=5).json()
    assert [model["id"] for model in models["data"]] == [MODEL]


def test_sockets_and_files_are_private(node: Node) -> None:
    assert node.runtime_dir.stat().st_mode & 0o077 == 0
    assert (node.runtime_dir / "node.json").stat().st_mode & 0o077 == 0
