"""Text mode of a real node (--use-sglang-tokenizer): chat answers equal the engine called directly, stops, samples, refusals."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from tests.e2e.conftest import CHAT_ENDS, CHAT_TOKENS, CHATS, MODEL, Messages
from tests.e2e.endpoint import ask
from tests.harness import CPU, ONE_THREAD, Node

FLAG = "--use-sglang-tokenizer"


@pytest.fixture(scope="module")
def node(model: Path, chat_reference: list[dict[str, Any]]) -> Iterator[Node]:
    with Node(str(model), "--served-model-name", MODEL, *CPU, FLAG, env=ONE_THREAD) as node:
        yield node.start().wait_ready(240)


@pytest.fixture(scope="module")
def client(node: Node) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0)


def chat(client: openai.OpenAI, messages: Messages, **more: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages, **{"temperature": 0, **more})


def fixed(client: openai.OpenAI, messages: Messages, **more: Any) -> Any:
    return chat(client, messages, max_tokens=CHAT_TOKENS, extra_body={"ignore_eos": True}, **more)


@pytest.mark.parametrize("number", range(len(CHATS)))
def test_answers_equal_the_engines_own(client: openai.OpenAI, chat_reference: list[dict[str, Any]], number: int) -> None:
    free = chat(client, CHATS[number], max_tokens=CHAT_ENDS)
    expected = chat_reference[len(CHATS) + number]
    assert free.choices[0].message.content == expected["text"]
    assert free.choices[0].finish_reason == ("length" if len(expected["ids"]) == CHAT_ENDS else "stop")
    assert free.choices[0].message.role == "assistant"


def test_a_stream_has_the_same_text_piece_by_piece(client: openai.OpenAI, chat_reference: list[dict[str, Any]]) -> None:
    for number, messages in enumerate(CHATS):
        chunks = [chunk for chunk in chat(client, messages, max_tokens=CHAT_ENDS, stream=True) if chunk.choices]
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(texts) == chat_reference[len(CHATS) + number]["text"]
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    assert len(texts) > 4, "it comes in pieces, not in one lump"


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI, chat_reference: list[dict[str, Any]]) -> None:
    whole = chat_reference[len(CHATS)]["text"]
    stop = next(c for c in whole[6:] if c.isascii() and c.isprintable() and c not in whole[:6])
    for given in (stop, ["no such word", stop]):
        stopped = chat(client, CHATS[0], max_tokens=CHAT_ENDS, stop=given)
        assert stopped.choices[0].message.content == whole[: whole.index(stop)]
        assert stopped.choices[0].finish_reason == "stop"


def test_two_samples_with_a_seed_are_two_answers(client: openai.OpenAI) -> None:
    made = chat(client, CHATS[0], max_tokens=CHAT_TOKENS, n=2, seed=7, temperature=1.0)
    assert sorted(choice.index for choice in made.choices) == [0, 1]
    contents = [choice.message.content for choice in made.choices]
    assert all(contents) and contents[0] != contents[1]
    streamed: dict[int, str] = {}
    for chunk in chat(client, CHATS[0], max_tokens=CHAT_TOKENS, n=2, seed=7, temperature=1.0, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert streamed.keys() == {0, 1} and all(streamed.values())


def test_a_bad_request_is_a_400_and_the_next_one_is_served(node: Node, client: openai.OpenAI) -> None:
    before = node.pid("engine")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "4096"),
        ({"messages": CHATS[0], "top_p": 7.0}, "Top_p"),
        ({"messages": CHATS[0], "n": 0}, "n"),
    ]
    for body, named in wrong:
        answer = requests.post(f"{node.url}/v1/chat/completions", json={"model": MODEL, "max_tokens": 8, **body}, timeout=30)
        assert answer.status_code == 400 and named in answer.text, answer.text
    assert fixed(client, CHATS[0]).choices[0].finish_reason is not None
    assert node.pid("engine") == before


def test_a_request_past_the_frontend_may_have_a_prompt(node: Node) -> None:
    """Dynamo's own health check sends one."""
    store = node.runtime_dir / "discovery"
    said = ask(store, "dynamo.backend.generate", {"prompt": "Test", "max_tokens": 4, "temperature": 0})
    assert said[-1]["choices"][0]["finish_reason"] in ("length", "stop")
    assert said[0]["object"] == "chat.completion.chunk" and said[0]["model"] == MODEL


def test_a_template_of_ones_own_is_refused_together_with_the_flag(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    refused = Node(str(model), *CPU, FLAG, "--custom-jinja-template", str(template))
    try:
        done = subprocess.run(
            refused.command(), env=refused.environment, capture_output=True, text=True, timeout=120, check=False
        )
    finally:
        refused.close()
    assert done.returncode != 0
    last = (done.stderr or done.stdout).strip().splitlines()[-1]
    assert "--custom-jinja-template" in last and FLAG in last, done.stderr


def test_a_text_mode_node_is_healthy_by_its_canary(node: Node) -> None:
    assert requests.get(f"{node.system_url}/ready", timeout=5).status_code == 200
    assert "engine 1: healthy" in (node.runtime_dir / "log" / "prober.log").read_text(errors="replace")
    assert node.status()["incarnation"] == 1
