"""The aggregated role's mapping: Dynamo's request to SGLang's arguments, and an engine output to Dynamo's chunk."""

from typing import Any

import pytest

from shared.errors import Code, NodeError, RequestError
from shared.frames import EngineFacts, Output
from shared.roles import PLANNED, ROLES, find
from shared.roles.role import Asked

FACTS = EngineFacts("aggregated", "x", "0", "/m", "m", 100, 4096, 16, 10, 4, 100, 0, 1, 1, [2], 0.1)
ROLE = find("aggregated")


def request(**more: Any) -> dict[str, Any]:
    return {"token_ids": [5, 6], "stop_conditions": {}, "sampling_options": {}, "output_options": {}, **more}


def asked(**more: Any) -> Asked:
    return Asked(request(**more), FACTS)


def payload(**more: Any) -> dict[str, Any]:
    (only,) = ROLE.to_engine(asked(**more))
    return only


def test_max_tokens_absent_means_until_the_end() -> None:
    assert payload()["sampling_params"] == {"max_new_tokens": None}
    assert payload(stop_conditions={"max_tokens": 7})["sampling_params"]["max_new_tokens"] == 7


def test_stop_conditions_and_sampling_options() -> None:
    made = payload(
        stop_conditions={"stop_token_ids": [7], "stop_token_ids_hidden": [2, 7], "min_tokens": 3, "ignore_eos": True},
        sampling_options={"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": None, "seed": 11, "presence_penalty": 0.1},
        routing={"dp_rank": 1, "priority": 4},
    )
    assert made["sampling_params"] == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "presence_penalty": 0.1,
        "sampling_seed": 11,
        "min_new_tokens": 3,
        "ignore_eos": True,
        "stop_token_ids": [2, 7],
        "max_new_tokens": None,
    }
    assert (made["routed_dp_rank"], made["priority"]) == (1, 4)


@pytest.mark.parametrize(
    ("guided", "expected"),
    [
        ({"json": {"type": "object"}}, {"json_schema": '{"type": "object"}'}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"choice": ["a.b", "c"]}, {"regex": r"(a\.b|c)"}),
        ({"grammar": "root ::= x"}, {"ebnf": "root ::= x"}),
        ({}, {}),
    ],
)
def test_guided_decoding(guided: dict[str, Any], expected: dict[str, Any]) -> None:
    params = payload(sampling_options={"guided_decoding": guided})["sampling_params"]
    assert params == {**expected, "max_new_tokens": None}


def test_samples_become_requests_with_their_own_seeds() -> None:
    made = ROLE.to_engine(asked(sampling_options={"n": 3, "seed": 5}))
    assert [p["sampling_params"]["sampling_seed"] for p in made] == [5, 6, 7]
    assert all("n" not in p["sampling_params"] for p in made)


@pytest.mark.parametrize("tokens", [[], None, "text", [100], [-1], [1.5], [True], [None]])
def test_wrong_tokens_are_refused(tokens: Any) -> None:
    with pytest.raises(RequestError) as caught:
        ROLE.to_engine(asked(token_ids=tokens))
    assert caught.value.code == Code.INVALID and "token_ids" in caught.value.message


def test_what_another_role_serves_is_refused_not_ignored() -> None:
    with pytest.raises(RequestError):
        ROLE.to_engine(asked(multi_modal_data={"image_url": []}))


def test_chunks() -> None:
    first = Output("r", 0, [7], None, {"prompt_tokens": 2, "completion_tokens": 1, "cached_tokens": 1})
    chunk = ROLE.to_dynamo(first, 0, asked())
    assert chunk["token_ids"] == [7] and "finish_reason" not in chunk
    assert chunk["completion_usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert ROLE.to_dynamo(Output("r", 1, [8]), 2, asked()) == {"index": 2, "token_ids": [8]}
    last = Output("r", 2, [], {"type": "stop", "matched": 9}, {"prompt_tokens": 2, "completion_tokens": 2, "cached_tokens": 0})
    chunk = ROLE.to_dynamo(last, 0, asked(stop_conditions={"stop_token_ids": [9]}))
    assert (chunk["finish_reason"], chunk["stop_reason"]) == ("stop", 9)
    assert chunk["engine_data"]["kv_cache_hit"] == {"prompt_tokens": 2, "reused_tokens": 0}
    assert "stop_reason" not in ROLE.to_dynamo(last, 0, asked()), "an id that the client didn't ask for is not shown"


def test_the_table_names_every_worker_type() -> None:
    assert len(ROLES) + len(PLANNED) == 10
    with pytest.raises(NodeError, match="not supported by this version"):
        find("image")
    with pytest.raises(NodeError, match="unknown role"):
        find("poet")
