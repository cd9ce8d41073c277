"""Embedding and rerank: what is embedded, what leaves as a vector or a score, and which requests are refused."""

import base64
import struct
from typing import Any

import pytest

from shared.errors import Code, RequestError
from shared.frames import Output
from shared.roles import find
from shared.roles.role import Asked, Role
from tests.unit.role_bench import FACTS, only, plain

EMBEDDING, RERANK = find("embedding"), find("rerank")
VECTOR = struct.pack("<3f", 0.5, -1.0, 2.0)


def refusal(role: Role, **fields: Any) -> str:
    with pytest.raises(RequestError) as caught:
        role.to_engine(plain(**fields))
    assert caught.value.code == Code.INVALID
    return caught.value.message


# --- embedding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a", ["a", "b"]])
def test_texts_are_embedded_as_texts(given: Any) -> None:
    assert only(EMBEDDING, plain(model="m", input=given)) == {"call": "embed", "text": given}


@pytest.mark.parametrize("given", [[5, 6], [[5], [6, 7]]])
def test_token_ids_are_embedded_as_token_ids(given: Any) -> None:
    assert only(EMBEDDING, plain(model="m", input=given)) == {"call": "embed", "input_ids": given}


@pytest.mark.parametrize("given", ["", [], [[]], [[5], []], ["a", 5], [[5], "a"], [[5], 6], [-1], [True], [1.5], [None], 5, None])
def test_any_other_input_is_refused(given: Any) -> None:
    message = refusal(EMBEDDING, model="m", input=given)
    assert "input" in message


@pytest.mark.parametrize("given", [[100], [[5], [6, 100]]])
def test_a_token_outside_the_vocabulary_is_named(given: Any) -> None:
    assert refusal(EMBEDDING, model="m", input=given) == "Token id 100 is out of vocabulary"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"input": "a"}, "model"),
        ({"model": "m"}, "input"),
        ({"model": "m", "input": "a", "dimensions": 0}, "dimensions"),
        ({"model": "m", "input": "a", "dimensions": "2"}, "dimensions"),
        ({"model": "m", "input": "a", "encoding_format": "hex"}, "encoding_format"),
    ],
)
def test_a_wrong_field_of_an_embedding_request_is_named(fields: dict[str, Any], named: str) -> None:
    assert named in refusal(EMBEDDING, **fields)


def embedded(vectors: list[bytes], **fields: Any) -> Any:
    found = plain(model="m", input="a", **fields)
    only(EMBEDDING, found)
    return EMBEDDING.to_dynamo(Output("r", 0, [], {"type": "stop"}, {"vectors": vectors, "prompt_tokens": 3}), 0, found)


def test_vectors_leave_as_base64_of_little_endian_floats() -> None:
    answer = embedded([VECTOR, VECTOR])
    assert (answer["object"], answer["model"], answer["usage"]) == ("list", "m", {"prompt_tokens": 3, "total_tokens": 3})
    assert [item["index"] for item in answer["data"]] == [0, 1]
    assert struct.unpack("<3f", base64.b64decode(answer["data"][1]["embedding"])) == (0.5, -1.0, 2.0)


def test_dimensions_keep_the_first_ones() -> None:
    answer = embedded([VECTOR], dimensions=2)
    assert struct.unpack("<2f", base64.b64decode(answer["data"][0]["embedding"])) == (0.5, -1.0)
    assert embedded([VECTOR], dimensions=3) == embedded([VECTOR])


def test_more_dimensions_than_the_model_has_are_the_client_s_mistake() -> None:
    with pytest.raises(RequestError, match="dimensions=4 exceeds model embedding dimension 3") as caught:
        embedded([VECTOR], dimensions=4)
    assert caught.value.code == Code.INVALID


# --- rerank --------------------------------------------------------------------------------------------------------------

QUESTION: dict[str, Any] = {"model": "m", "query": "q", "documents": ["a", "b", "c"]}


def test_a_query_is_paired_with_each_document() -> None:
    assert only(RERANK, plain(**QUESTION)) == {
        "call": "embed",
        "text": [["q", "a"], ["q", "b"], ["q", "c"]],
        "is_cross_encoder_request": True,
    }


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"query": " "}, "Query cannot be empty or whitespace only"),
        ({"documents": []}, "Documents cannot be empty"),
        ({"documents": ["a", "\t"]}, "Each document cannot be empty or whitespace only"),
        ({"documents": "a"}, "documents"),
        ({"documents": [1]}, "documents"),
        ({"top_n": 0}, "top_n"),
        ({"return_documents": "yes"}, "return_documents"),
        ({"query": None}, "query"),
    ],
)
def test_a_wrong_rerank_request_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    assert named in refusal(RERANK, **{**QUESTION, **fields})


def ranked(scores: list[float], infos: list[Any] | None = None, **fields: Any) -> Any:
    found = plain(**{**QUESTION, **fields})
    only(RERANK, found)
    return RERANK.to_dynamo(Output("r", 0, [], {"type": "stop"}, {"scores": scores, "infos": infos}), 0, found)


def test_the_best_comes_first_and_equals_in_their_order() -> None:
    assert [(entry["index"], entry["document"]) for entry in ranked([0.1, 0.9, 0.9])] == [(1, "b"), (2, "c"), (0, "a")]


def test_top_n_and_documents_left_out() -> None:
    infos = [{"id": 0}, {"id": 1}, {"id": 2}]
    assert ranked([0.1, 0.9, 0.5], infos, top_n=2, return_documents=False) == [
        {"score": 0.9, "index": 1, "meta_info": {"id": 1}},
        {"score": 0.5, "index": 2, "meta_info": {"id": 2}},
    ]
    assert len(ranked([0.1, 0.9, 0.5], top_n=9)) == 3


@pytest.mark.parametrize("scores", [[], [0.1, 0.2]])
def test_a_missing_score_is_the_engine_s_failure(scores: list[float]) -> None:
    with pytest.raises(RequestError, match=f"returned {len(scores)} scores for 3 documents") as caught:
        ranked(scores)
    assert caught.value.code == Code.INTERNAL


@pytest.mark.parametrize("role", [EMBEDDING, RERANK])
def test_pooling_roles_trace_and_have_neither_adapters_nor_a_text_mode(role: Role) -> None:
    found = Asked(role.canary_request(FACTS), FACTS, "ctx", {"traceparent": "x"})
    assert only(role, found)["external_trace_header"] == {"traceparent": "x"}
    assert not role.generates and find(role.name, text=True) is role and role.model_input == "Text"
