"""Embeddings and rerank scores through real nodes: equal to the engine called directly; what is wrong is a 400 that says why."""

import base64
import itertools
import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from tests.e2e.conftest import MODEL
from tests.e2e.direct import Call, direct
from tests.harness import CPU, ONE_THREAD, SGNODE, Node

DIMENSIONS = 64
TEXT = "The quick brown fox jumps over the lazy dog."
TEXTS = [TEXT, "One token after another.", "A node serves requests; a crash stays where it happened."]
IDS = [21, 34, 55, 89, 144]
BATCH = [IDS, [13, 8, 5], [200, 201]]
INPUTS: dict[str, Any] = {"a text": TEXT, "texts": TEXTS, "token ids": IDS, "lists of token ids": BATCH}
QUERY = "quick fox"
DOCUMENTS = ["the lazy dog", "quick brown fox", "one token after another", "a crash", "nodes and requests, none lost"]


def demo_model(path: Path, arch: str) -> Path:
    subprocess.run([SGNODE, "demo-model", str(path), "--arch", arch], check=True, capture_output=True, timeout=120)
    return path


def served(model: Path, flag: str) -> Node:
    return Node(str(model), "--served-model-name", MODEL, *CPU, flag, env=ONE_THREAD)


def post(node: Node, path: str, **body: Any) -> requests.Response:
    return requests.post(f"{node.url}/v1/{path}", json={"model": MODEL, **body}, timeout=60)


def is_healthy(node: Node) -> None:
    """Ready, and by a canary's verdict."""
    assert requests.get(f"{node.system_url}/ready", timeout=5).status_code == 200
    log = (node.runtime_dir / "log" / "prober.log").read_text(errors="replace")
    assert re.search(r"engine 1: healthy", log), log[-2000:]
    assert requests.get(f"{node.system_url}/health", timeout=5).json()["status"] == "ready"


# --- embeddings ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedding_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_model(tmp_path_factory.mktemp("models") / "demo-qwen3", "qwen3")


@pytest.fixture(scope="module")
def vectors(embedding_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[float]]]:
    """What the engine says to INPUTS when nothing is in between."""
    calls: list[Call] = []
    for given in INPUTS.values():
        is_text = isinstance(given, str) or isinstance(given[0], str)
        calls.append(("embed", {"text" if is_text else "input_ids": given}))
    answers = direct(embedding_model, ["--embedding-worker"], calls, tmp_path_factory.mktemp("direct"))
    return dict(zip(INPUTS, answers, strict=True))


@pytest.fixture(scope="module")
def embedder(embedding_model: Path, vectors: dict[str, list[list[float]]]) -> Iterator[Node]:
    with served(embedding_model, "--embedding-worker") as node:
        yield node.start().wait_ready(240)


def of(answer: requests.Response) -> list[list[float]]:
    """The answer's vectors as 32-bit floats, which must be in the order of the input."""
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return [floats(one["embedding"]) for one in data]


def floats(vector: list[float] | str) -> list[float]:
    """Numbers come with the digits that a 32-bit float needs; in base64 they are 32-bit floats."""
    raw = base64.b64decode(vector) if isinstance(vector, str) else struct.pack(f"<{len(vector)}f", *vector)
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def is_base64(answer: requests.Response) -> bool:
    return all(isinstance(one["embedding"], str) for one in answer.json()["data"])


@pytest.mark.parametrize("kind", INPUTS)
def test_vectors_equal_the_engines_own(embedder: Node, vectors: dict[str, list[list[float]]], kind: str) -> None:
    numbers = post(embedder, "embeddings", input=INPUTS[kind], encoding_format="float")
    assert of(numbers) == vectors[kind] and not is_base64(numbers)
    assert all(len(vector) == DIMENSIONS for vector in of(numbers))
    text = post(embedder, "embeddings", input=INPUTS[kind], encoding_format="base64")
    assert of(text) == vectors[kind] and is_base64(text)
    default = post(embedder, "embeddings", input=INPUTS[kind])
    assert of(default) == vectors[kind] and not is_base64(default)


def test_different_inputs_have_different_vectors(vectors: dict[str, list[list[float]]]) -> None:
    found = [tuple(vector) for vector in (*vectors["texts"], *vectors["lists of token ids"])]
    assert all(a != b for a, b in itertools.combinations(found, 2))


def test_dimensions_keep_the_first_ones(embedder: Node, vectors: dict[str, list[list[float]]]) -> None:
    short = of(post(embedder, "embeddings", input=TEXTS, dimensions=8))
    assert short == [vector[:8] for vector in vectors["texts"]]
    encoded = of(post(embedder, "embeddings", input=TEXT, dimensions=8, encoding_format="base64"))
    assert encoded == [vectors["a text"][0][:8]]
    assert of(post(embedder, "embeddings", input=TEXT, dimensions=DIMENSIONS)) == vectors["a text"]


def test_usage_counts_the_tokens_of_all_inputs(embedder: Node) -> None:
    usage = post(embedder, "embeddings", input=BATCH).json()["usage"]
    assert usage["prompt_tokens"] == usage["total_tokens"] == sum(map(len, BATCH))
    each = [post(embedder, "embeddings", input=text).json()["usage"]["prompt_tokens"] for text in TEXTS]
    assert min(each) > 1
    assert post(embedder, "embeddings", input=TEXTS).json()["usage"]["prompt_tokens"] == sum(each)


def test_the_openai_client_works(embedder: Node, vectors: dict[str, list[list[float]]]) -> None:
    client = openai.OpenAI(base_url=f"{embedder.url}/v1", api_key="none", max_retries=0)
    made = client.embeddings.create(model=MODEL, input=TEXTS)  # it asks for base64 by itself
    assert [floats(one.embedding) for one in made.data] == vectors["texts"]
    assert made.model == MODEL and made.usage.prompt_tokens > 0


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [TEXT, ""]}, "input"),  # which SGLang's scheduler would die of
        ({"input": [[5, 6], []]}, "input"),
        ({"input": [TEXT, 5]}, "EmbeddingInput"),
        ({"input": 5}, "EmbeddingInput"),
        ({}, "input"),
        ({"input": [5, 99_999]}, "99999"),
        ({"input": TEXT, "dimensions": DIMENSIONS + 1}, "dimensions"),
        ({"input": TEXT, "dimensions": 0}, "dimensions"),
        ({"input": TEXT, "encoding_format": "octal"}, "octal"),
        ({"input": [7] * 5000}, "5000"),
    ],
)
def test_a_wrong_embedding_request_is_a_400_that_names_the_field(embedder: Node, body: dict[str, Any], named: str) -> None:
    answer = post(embedder, "embeddings", **body)
    assert answer.status_code == 400 and named in answer.text, answer.text
    assert of(post(embedder, "embeddings", input=IDS)), "the next one is served"


def test_an_embedding_node_is_healthy_by_its_canary(embedder: Node) -> None:
    is_healthy(embedder)
    assert embedder.status()["role"] == "embedding" and embedder.status()["incarnation"] == 1


# --- rerank ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rerank_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_model(tmp_path_factory.mktemp("models") / "demo-reranker", "reranker")


@pytest.fixture(scope="module")
def scores(rerank_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """What the engine says to QUERY and DOCUMENTS."""
    pairs = [[QUERY, document] for document in DOCUMENTS]
    found = direct(rerank_model, ["--rerank-worker"], [("rerank", {"prompt": pairs})], tmp_path_factory.mktemp("direct"))[0]
    return [value[0] if isinstance(value, list) else value for value in found]


@pytest.fixture(scope="module")
def reranker(rerank_model: Path, scores: list[float]) -> Iterator[Node]:
    with served(rerank_model, "--rerank-worker") as node:
        yield node.start().wait_ready(240)


def rerank(node: Node, **body: Any) -> list[dict[str, Any]]:
    answer = post(node, "rerank", **{"query": QUERY, "documents": DOCUMENTS, **body})
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()
    return found


def test_scores_equal_the_engines_own_and_the_best_is_first(reranker: Node, scores: list[float]) -> None:
    assert len(set(scores)) == len(scores), "the documents must be told apart"
    found = rerank(reranker)
    best_first = sorted(range(len(scores)), key=lambda number: -scores[number])
    assert [one["index"] for one in found] == best_first
    assert [one["score"] for one in found] == [scores[number] for number in best_first]
    assert [one["document"] for one in found] == [DOCUMENTS[number] for number in best_first]


def test_equal_documents_keep_their_order(reranker: Node) -> None:
    found = rerank(reranker, documents=["a crash"] * 3)
    assert [one["index"] for one in found] == [0, 1, 2] and len({one["score"] for one in found}) == 1


def test_top_n_keeps_the_best(reranker: Node) -> None:
    everything = [one["index"] for one in rerank(reranker)]
    assert [one["index"] for one in rerank(reranker, top_n=2)] == everything[:2]
    assert [one["index"] for one in rerank(reranker, top_n=50)] == everything


def test_documents_can_be_left_out(reranker: Node) -> None:
    assert all(not one.get("document") for one in rerank(reranker, return_documents=False))


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"query": " "}, "Query"),
        ({"documents": []}, "Documents"),
        ({"documents": ["a", " "]}, "document"),
        ({"documents": "a"}, "documents"),
        ({"documents": ["a", 5]}, "documents"),
        ({"query": 5}, "query"),
        ({"top_n": 0}, "top_n"),
        ({"top_n": "x"}, "top_n"),
        ({"return_documents": "x"}, "return_documents"),
        ({"documents": ["word " * 2000]}, "512"),
    ],
)
def test_a_wrong_rerank_request_is_a_400_that_names_the_field(reranker: Node, body: dict[str, Any], named: str) -> None:
    answer = post(reranker, "rerank", **{"query": QUERY, "documents": DOCUMENTS, **body})
    assert answer.status_code == 400 and named in answer.text, answer.text
    assert rerank(reranker, documents=["a crash"]), "the next one is served"


def test_a_rerank_node_is_healthy_by_its_canary(reranker: Node) -> None:
    is_healthy(reranker)
    assert reranker.status()["role"] == "rerank" and reranker.status()["incarnation"] == 1
