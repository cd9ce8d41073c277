"""--frontend-decoding on a real node: Dynamo's frontend decodes, the engine reads its memory, and outlives whatever it does."""

import base64
import concurrent.futures
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from transformers import AutoTokenizer

from tests import media
from tests.e2e.conftest import MODEL
from tests.e2e.endpoint import each
from tests.harness import CPU, ONE_THREAD, Node, send, wait_for

TOKENS = 24
TIMEOUT = 2
"""Seconds for one read (--media-timeout)."""
CHATS = {"one": [1], "another": [2], "two": [1, 2], "the same twice": [3, 3]}
"""Pictures of each, before the words."""
WORDS = "The quick brown fox"
IDLE = {"nixl_registered": 0.0, "nixl_late": 0.0, "nixl_late_bytes": 0.0}


@pytest.fixture(scope="module")
def node(vision: Path) -> Iterator[Node]:
    env = {**ONE_THREAD, "TORCHDYNAMO_DISABLE": "1"}
    flags = ["--frontend-decoding", "--media-timeout", str(TIMEOUT)]
    with Node(str(vision), "--served-model-name", MODEL, *CPU, *flags, env=env) as node:
        yield node.start().wait_ready(240)


def content(pictures: list[int]) -> list[dict[str, Any]]:
    return [*(media.part(media.url(media.good(seed))) for seed in pictures), {"type": "text", "text": WORDS}]


def body(found: Any, **more: Any) -> dict[str, Any]:
    fixed = {"model": MODEL, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    return {**fixed, "messages": [{"role": "user", "content": found}], **more}


def chat(node: Node, found: Any) -> requests.Response:
    return requests.post(f"{node.url}/v1/chat/completions", json=body(found), timeout=60)


def said(node: Node, pictures: list[int]) -> str:
    answer = chat(node, content(pictures))
    assert answer.status_code == 200, answer.text[:500]
    return str(answer.json()["choices"][0]["message"]["content"])


def streamed(node: Node, pictures: list[int]) -> str:
    found = body(content(pictures), stream=True)
    with requests.post(f"{node.url}/v1/chat/completions", json=found, stream=True, timeout=60) as answer:
        assert answer.status_code == 200, answer.text[:500]
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith(b"data: {")]
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


def numbers(node: Node, process: str = "engine") -> dict[str, float]:
    text = requests.get(f"{node.system_url}/metrics", timeout=10).text
    found = re.findall(rf'^sgnode_(\w+)\{{process="{process}"\}} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def held(node: Node) -> dict[str, float]:
    return {name: value for name, value in numbers(node).items() if name in IDLE}


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


class Past:
    """Requests to the worker itself, past the frontend."""

    def __init__(self, node: Node, model: Path) -> None:
        self._node = node
        self._tokenizer = AutoTokenizer.from_pretrained(model)

    def request(self, pictures: list[int], items: list[Any]) -> dict[str, Any]:
        """A prompt with so many pictures; ``items`` stand for them."""
        messages = [{"role": "user", "content": content(pictures)}]
        ids = self._tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
        return {
            "model": MODEL,
            "token_ids": ids,
            "multi_modal_data": {"image_url": items},
            "stop_conditions": {"max_tokens": TOKENS, "ignore_eos": True},
            "sampling_options": {"temperature": 0},
            "output_options": {},
            "eos_token_ids": [],
            "annotations": [],
        }

    def each(self, requests: list[Any]) -> list[Any]:
        return each(self._node.runtime_dir / "discovery", "dynamo.backend.generate", requests)

    def texts(self, chats: list[list[int]]) -> list[str]:
        """The same requests as a frontend that does not decode sends them."""
        asked = [self.request(chat, [{"Url": media.url(media.good(seed))} for seed in chat]) for chat in chats]
        tokens = [[token for chunk in chunks for token in chunk["token_ids"]] for chunks in self.each(asked)]
        return [str(self._tokenizer.decode(ids, skip_special_tokens=True)) for ids in tokens]


@pytest.fixture(scope="module")
def past(node: Node, vision: Path) -> Past:
    return Past(node, vision)


def test_answers_equal_those_to_images_that_the_engine_decodes(node: Node, past: Past) -> None:
    expected = dict(zip(CHATS, past.texts([*CHATS.values()]), strict=True))
    assert len(set(expected.values())) == len(CHATS), expected
    before = numbers(node)["nixl_read_bytes"]
    for name, pictures in CHATS.items():
        assert said(node, pictures) == streamed(node, pictures) == expected[name], name
    width, height = media.SIZE
    read = 2 * 3 * width * height * sum(map(len, CHATS.values()))
    wait_for("the pixels are counted", lambda: numbers(node)["nixl_read_bytes"] - before == read, 10)
    pids = node.pid("frontend"), node.pid("engine")
    found = [descriptors(pid) for pid in pids]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for name, text in pool.map(lambda name: (name, streamed(node, CHATS[name])), [*CHATS] * 10):
            assert text == expected[name], name
    wait_for("no descriptor is left", lambda: all(descriptors(pid) <= had + 2 for pid, had in zip(pids, found, strict=True)), 20)
    wait_for("nothing is held", lambda: held(node) == IDLE, 10)


def test_hostile_images_end_at_the_frontend_and_forged_ones_at_the_agent(node: Node, past: Past) -> None:
    good, engine = said(node, [1]), node.pid("engine")
    for reference in (media.url(b"nothing"), media.url(media.good(1)[:200]), media.url(media.png_bomb(10_000))):
        answer = chat(node, [media.part(reference), {"type": "text", "text": WORDS}])
        assert answer.status_code == 400, answer.text[:300]
    metadata = "b64:" + base64.b64encode(b"nothing").decode()
    item = {"nixl_metadata": metadata, "nixl_descriptor": {"addr": 4096, "size": 12, "mem_type": "Dram"}, "shape": [2, 2, 3]}
    forged = [{}, {"shape": [2, 2, 4]}, {"shape": [1 << 20, 1 << 20, 3]}, {"nixl_metadata": 5}, {"shape": [2, 2, 3, 1]}]
    asked = [past.request([1], [{"Decoded": {**item, **wrong, "dtype": "UINT8"}}]) for wrong in forged]
    for found in past.each(asked):
        assert "InvalidArgument" in found and "image 1" in found
    assert said(node, [1]) == good and node.pid("engine") == engine
    assert held(node) == IDLE


def pending(node: Node, pool: concurrent.futures.Executor) -> "concurrent.futures.Future[requests.Response]":
    """A request whose pixels the engine is about to read out of a frontend that stands still."""
    engine, frontend = node.pid("engine"), node.pid("frontend")
    send(engine, signal.SIGSTOP)
    try:
        asked = pool.submit(chat, node, content([2]))
        wait_for("the agent has it", lambda: numbers(node, "agent:0")["inflight"] == 1, 10)
        send(frontend, signal.SIGSTOP)
    finally:
        send(engine, signal.SIGCONT)
    return asked


def test_a_frontend_that_stands_still_or_dies_costs_its_requests_only(node: Node) -> None:
    good, engine = said(node, [2]), node.pid("engine")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pending(node, pool)
        wait_for("the read is late", lambda: held(node).get("nixl_late") == 1, 20)
        assert held(node)["nixl_late_bytes"] == 3 * media.SIZE[0] * media.SIZE[1]
        send(node.pid("frontend"), signal.SIGCONT)
        assert asked.result(30).status_code == 503, "which a frontend that migrates asks another worker for"
        wait_for("nothing is held", lambda: held(node) == IDLE, 20)

        asked = pending(node, pool)
        wait_for("it is being read", lambda: held(node).get("nixl_registered") == 1, 20)
        dead = node.pid("frontend")
        send(dead, signal.SIGKILL)
        with pytest.raises(requests.RequestException):
            asked.result(30)
    wait_for("nothing is held", lambda: held(node) == IDLE, 20)
    wait_for("another frontend", lambda: node.pid("frontend") != dead and node._listed(), 30)
    assert said(node, [2]) == good and node.pid("engine") == engine
