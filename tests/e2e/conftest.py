"""Fixtures on the real engine."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.direct import Call, direct
from tests.harness import CPU, SGNODE, Node

MODEL = "demo"
PROMPTS = [[20 + i, 30 + i % 7, *range(40, 40 + 3 * i)] for i in range(50)]
"""Of 2 to 149 tokens: less than a KV block, and several."""
NEW_TOKENS = 24
Messages = list[dict[str, str]]
CHATS: list[Messages] = [
    [{"role": "user", "content": "The quick brown fox"}],
    [{"role": "user", "content": "A node serves requests; ünïcode: 日本語 🦊"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One token after another"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c " * 40}],
]
CHAT_TOKENS = 32
CHAT_ENDS = 400
"""Tokens in which some greedy answers end by themselves."""


@pytest.fixture(scope="session")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny vision model."""
    path = tmp_path_factory.mktemp("models") / "demo-vision"
    subprocess.run([SGNODE, "demo-model", "--vision", str(path)], check=True, capture_output=True, timeout=120)
    return path


@pytest.fixture(scope="session")
def direct_answers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What one engine, called directly, makes of PROMPTS, of CHATS with CHAT_TOKENS, and of CHATS until they end."""
    params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    calls: list[Call] = [("generate", {"input_ids": prompt, "sampling_params": params}) for prompt in PROMPTS]
    for of_chat in ({**params, "max_new_tokens": CHAT_TOKENS}, {"temperature": 0, "max_new_tokens": CHAT_ENDS}):
        calls += [("chat", {"messages": chat, "sampling_params": of_chat}) for chat in CHATS]
    found = direct(model, [], calls, tmp_path_factory.mktemp("direct"))
    assert all(len(ids) == NEW_TOKENS for ids in found[: len(PROMPTS)])
    assert len({tuple(ids) for ids in found[: len(PROMPTS)]}) > 40, "the prompts must tell the answers apart"
    assert len({answer["text"] for answer in found[-len(CHATS) :]}) == len(CHATS), "the chats too"
    return found


@pytest.fixture(scope="session")
def reference(direct_answers: list[Any]) -> list[list[int]]:
    """NEW_TOKENS greedy tokens of each of PROMPTS."""
    return list(direct_answers[: len(PROMPTS)])


@pytest.fixture(scope="session")
def chat_reference(direct_answers: list[Any]) -> list[dict[str, Any]]:
    """Answers to CHATS with CHAT_TOKENS, and then until they end."""
    return list(direct_answers[len(PROMPTS) :])


@pytest.fixture(scope="session")
def node(model: Path) -> Iterator[Node]:
    """One real node for test_serving, and for test_stop, which ends it. Its processes log every import they make."""
    with Node(str(model), "--served-model-name", MODEL, *CPU, env={"PYTHONPROFILEIMPORTTIME": "1"}) as node:
        temporary = node.root / "tmp"
        temporary.mkdir()
        node.environment["TMPDIR"] = str(temporary)
        yield node.start().wait_ready()
