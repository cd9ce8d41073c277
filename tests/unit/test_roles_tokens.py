"""Roles that generate in token form: Dynamo's request to SGLang's arguments, and an engine output to Dynamo's chunk."""

import array
from typing import Any

import msgspec
import pytest

from shared.errors import Code, NodeError, RequestError
from shared.frames import Output
from shared.roles import ROLES, find
from shared.roles.role import Asked
from tests.unit.role_bench import FACTS, asked, only, said

ROLE = find("aggregated")
DIFFUSION = find("diffusion_lm")


def payload(**more: Any) -> dict[str, Any]:
    return only(ROLE, asked(**more))


def refusal(found: Asked) -> str:
    with pytest.raises(RequestError) as caught:
        ROLE.to_engine(found)
    assert caught.value.code == Code.INVALID
    return caught.value.message


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


def test_without_a_tokenizer_a_floor_of_tokens_holds_the_engine_open() -> None:
    bare = msgspec.structs.replace(FACTS, skip_tokenizer_init=True)
    stop = {"stop_token_ids": [7], "min_tokens": 3, "ignore_eos": False}
    assert only(ROLE, asked(bare, stop_conditions=stop))["sampling_params"] == {"ignore_eos": True, "max_new_tokens": None}
    stop["min_tokens"] = 0
    params = only(ROLE, asked(bare, stop_conditions=stop))["sampling_params"]
    assert params == {"min_new_tokens": 0, "ignore_eos": False, "stop_token_ids": [7], "max_new_tokens": None}


def test_stop_ids_that_can_never_come_don_t_reach_the_engine() -> None:
    params = payload(stop_conditions={"stop_token_ids": [99, 100, -1], "min_tokens": 2})["sampling_params"]
    assert params["stop_token_ids"] == [99]
    assert "stop_token_ids" not in payload(stop_conditions={"stop_token_ids": [2**40]})["sampling_params"]


@pytest.mark.parametrize(
    ("guided", "expected"),
    [
        ({"json": {"type": "object"}}, {"json_schema": '{"type": "object"}'}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"choice": ["a.b", "c"]}, {"regex": r"(a\.b|c)"}),
        ({"choice": [None], "grammar": "root ::= x"}, {"ebnf": "root ::= x"}),
        ({"grammar": "root ::= x"}, {"ebnf": "root ::= x"}),
        ({"structural_tag": {"type": "tag"}}, {"structural_tag": '{"type": "tag"}'}),
        ({"structural_tag": "as it is"}, {"structural_tag": "as it is"}),
        ({}, {}),
    ],
)
def test_guided_decoding(guided: dict[str, Any], expected: dict[str, Any]) -> None:
    params = payload(sampling_options={"guided_decoding": guided})["sampling_params"]
    assert params == {**expected, "max_new_tokens": None}


@pytest.mark.parametrize("schema", [b"x", {"a": b"x"}, {1, 2}])
def test_a_schema_that_is_not_json_is_refused(schema: Any) -> None:
    with pytest.raises(RequestError, match=r"guided_decoding\.json") as caught:
        payload(sampling_options={"guided_decoding": {"json": schema}})
    assert caught.value.code == Code.INVALID


@pytest.mark.parametrize("guided", [{"regex": 5}, {"grammar": ["x"]}, {"json": {"$ref": "#"}}])
def test_a_constraint_that_the_scheduler_would_stumble_over_is_refused(guided: dict[str, Any]) -> None:
    assert refusal(asked(sampling_options={"guided_decoding": guided}))


def test_samples_become_requests_with_their_own_seeds() -> None:
    found = asked(sampling_options={"n": 3, "seed": 5})
    made = ROLE.to_engine(found)
    assert [p["sampling_params"]["sampling_seed"] for p in made] == [5, 6, 7] and found.kept["samples"] == 3
    assert all("n" not in p["sampling_params"] for p in made)
    unseeded = ROLE.to_engine(asked(sampling_options={"n": 2}))
    assert len(unseeded) == 2 and not any("sampling_seed" in p["sampling_params"] for p in unseeded)


@pytest.mark.parametrize("count", [0, 129, -1, 1.5, "2", True])
def test_a_number_of_samples_that_can_t_be_is_refused(count: Any) -> None:
    assert "sampling_options.n" in refusal(asked(sampling_options={"n": count}))


@pytest.mark.parametrize("tokens", [[], None, "text", [100], [-1], [1.5], [True], [None], b"\x01", 7, {"a": 1}])
def test_wrong_tokens_are_refused(tokens: Any) -> None:
    message = refusal(asked(token_ids=tokens))
    assert "token_ids" in message or "invalid request" in message


def test_packed_tokens_are_taken_and_the_request_stays_as_it_is() -> None:
    found = asked(token_ids=array.array("i", [5, 99]).tobytes())
    before = dict(found.request)
    assert only(ROLE, found)["input_ids"] == [5, 99] and found.request == before
    assert payload(token_ids=(7, 8))["input_ids"] == [7, 8]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"stop_conditions": {"max_tokens": -1}}, "stop_conditions.max_tokens"),
        ({"stop_conditions": {"stop_token_ids": ["a"]}}, "stop_conditions.stop_token_ids"),
        ({"sampling_options": {"temperature": "hot"}}, "sampling_options.temperature"),
        ({"sampling_options": []}, "sampling_options"),
        ({"routing": {"dp_rank": -1}}, "routing.dp_rank"),
        ({"routing": {"priority": float("nan")}}, "routing.priority"),
        ({"routing": {"priority": 2**31}}, "routing.priority"),
        ({"bootstrap_info": {"bootstrap_port": 65536}}, "bootstrap_info.bootstrap_port"),
        ({"bootstrap_info": {"bootstrap_room": 2**63}}, "bootstrap_info.bootstrap_room"),
        ({"annotations": "x"}, "annotations"),
        ({"extra_args": "x"}, "extra_args"),
        ({"cache_salt": 5}, "cache_salt"),
        ({"extra_args": {"nvext": {"cache_salt": 5}}}, "cache_salt"),
        ({"annotations": ["x-bypass-remote-prefill"]}, "conditional disaggregation"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], named: str) -> None:
    assert named in refusal(asked(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"multi_modal_data": {"image_url": ["u"]}},
        {"extra_args": {"messages": [{"content": [{"type": "text"}, {"type": "image_url"}]}]}},
        {"extra_args": {"messages": [{"content": [{"type": "input_audio"}]}]}},
    ],
)
def test_media_is_refused_not_ignored(fields: dict[str, Any]) -> None:
    assert "does not accept" in refusal(asked(**fields))


def test_what_looks_a_bit_like_media_is_no_media() -> None:
    messages = ["x", {"content": "image_url"}, {"content": [1, {"type": "text"}]}]
    assert payload(multi_modal_data={}, extra_args={"messages": messages})["input_ids"] == [5, 6]


def test_salt_trace_rank_and_what_only_the_engine_can_judge_go_along() -> None:
    made = only(
        ROLE,
        asked(
            trace={"traceparent": "x"},
            routing={"dp_rank": 2**32 - 1, "priority": 2.9, "cache_salt": "first"},
            cache_salt="last",
            model="m",
            agent_context={"session_id": "s"},
            require_reasoning=False,
            thinking_token_budget=9,
        ),
    )
    assert made["cache_salt"] == "first" and made["external_trace_header"] == {"traceparent": "x"}
    assert "routed_dp_rank" not in made and made["priority"] == 2
    assert made["asks"] == {"model": "m", "agent_context": {"session_id": "s"}, "thinking_token_budget": 9}
    assert {"asks", "cache_salt", "external_trace_header", "routed_dp_rank", "priority"}.isdisjoint(payload())


def test_log_probabilities_are_asked_for() -> None:
    assert payload(output_options={"logprobs": 0})["return_logprob"] is True
    made = payload(output_options={"logprobs": 3, "prompt_logprobs": 2})
    assert (made["return_logprob"], made["top_logprobs_num"], made["logprob_start_len"]) == (True, 3, 0)
    assert "return_logprob" not in payload(output_options={"logprobs": None})


def test_uploads_name_a_place_for_each_sample_and_only_where_they_are_allowed() -> None:
    wish: dict[str, Any] = {"nvext": {"metadata_upload": {"url": "s3://bucket/x"}}}
    allowed = msgspec.structs.replace(FACTS, uploads=True)
    made = ROLE.to_engine(asked(allowed, sampling_options={"n": 2}, **wish))
    assert [p["upload"] for p in made] == [{"url": "s3://bucket/x", "index": 0}, {"url": "s3://bucket/x", "index": 1}]
    assert "upload" in only(ROLE, asked(allowed, **wish)) and "upload" not in payload(**wish)
    assert "metadata_upload" in refusal(asked(allowed, nvext={"metadata_upload": 5}))


# --- diffusion_lm --------------------------------------------------------------------------------------------------------


def test_a_diffusion_model_gets_prompt_and_sampling_alone() -> None:
    found = asked(
        trace={"a": "b"},
        routing={"priority": 3},
        cache_salt="s",
        output_options={"logprobs": 1},
        sampling_options={"n": 2, "seed": 1},
    )
    made = DIFFUSION.to_engine(found)
    assert [set(p) for p in made] == [{"input_ids", "sampling_params", "external_trace_header"}] * 2
    assert [p["sampling_params"]["sampling_seed"] for p in made] == [1, 2]


@pytest.mark.parametrize(
    "fields",
    [
        {"stop_conditions": {"max_thinking_tokens": 5}},
        {"thinking_token_budget": 0},
        {"nvext": {"max_thinking_tokens": 1}},
    ],
)
def test_a_diffusion_model_has_no_thinking_budget(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="thinking_token_budget") as caught:
        DIFFUSION.to_engine(asked(**fields))
    assert caught.value.code == Code.INVALID


# --- chunks --------------------------------------------------------------------------------------------------------------

USAGE = {"prompt_tokens": 2, "completion_tokens": 2, "cached_tokens": 0}


def test_chunks() -> None:
    first = Output("r", 0, [7], None, {"prompt_tokens": 2, "completion_tokens": 1, "cached_tokens": 1})
    chunk = said(ROLE, first, 0, asked())
    assert chunk["token_ids"] == [7] and "finish_reason" not in chunk and "engine_data" not in chunk
    assert chunk["completion_usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert said(ROLE, Output("r", 1, [8]), 2, asked()) == {"index": 2, "token_ids": [8]}
    last = Output("r", 2, [], {"type": "stop", "matched": 9}, dict(USAGE))
    chunk = said(ROLE, last, 0, asked(stop_conditions={"stop_token_ids": [9]}))
    assert (chunk["finish_reason"], chunk["stop_reason"]) == ("stop", 9)
    assert chunk["engine_data"]["kv_cache_hit"] == {"prompt_tokens": 2, "reused_tokens": 0}
    assert "stop_reason" not in said(ROLE, last, 0, asked()), "an id that the client didn't ask for is not shown"


def test_several_samples_measure_no_cache() -> None:
    found = asked(sampling_options={"n": 2})
    ROLE.to_engine(found)
    assert "engine_data" not in said(ROLE, Output("r", 0, [7], {"type": "length"}, dict(USAGE)), 1, found)


@pytest.mark.parametrize(
    ("finish", "stop", "reason"),
    [
        ({"type": "stop", "matched": "END"}, {}, "END"),
        ({"type": "stop", "matched": [9, 8]}, {"stop_token_ids": [8, 9]}, [9, 8]),
        ({"type": "stop", "matched": [9, 7]}, {"stop_token_ids": [8, 9]}, None),
        ({"type": "stop", "matched": True}, {"stop_token_ids": [1]}, None),
        ({"type": "stop", "matched": 2}, {"stop_token_ids_hidden": [2]}, None),
        ({"type": "length", "length": 5}, {"stop_token_ids": [9]}, None),
    ],
)
def test_the_stop_that_matched_is_shown_when_the_client_named_it(finish: Any, stop: Any, reason: Any) -> None:
    assert said(ROLE, Output("r", 0, [7], finish), 0, asked(stop_conditions=stop)).get("stop_reason") == reason


def test_an_abort_is_a_cancellation() -> None:
    assert said(ROLE, Output("r", 0, [], {"type": "abort"}), 0, asked())["finish_reason"] == "cancelled"


def test_log_probabilities_of_answer_and_prompt() -> None:
    meta = {
        "output_token_logprobs": [[-0.5, 7, None]],
        "output_top_logprobs": [[[-0.5, 7, None], [-1.5, 8, None]]],
        "input_token_logprobs": [[None, 5, None], [-2.0, 6, None]],
    }
    chunk = said(ROLE, Output("r", 0, [7], {"type": "stop"}, {**USAGE, **meta}), 0, asked())
    assert chunk["log_probs"] == [-0.5] and [entry["token_id"] for entry in chunk["top_logprobs"][0]] == [7, 8]
    assert chunk["engine_data"]["prompt_logprobs"] == [None, {"6": {"logprob": -2.0}}]
    middle = said(ROLE, Output("r", 0, [7], None, meta), 0, asked())
    assert middle["log_probs"] == [-0.5] and "engine_data" not in middle and "completion_usage" not in middle


def test_routed_experts_go_along() -> None:
    assert said(ROLE, Output("r", 0, [7], None, {"routed_experts": "b64"}), 0, asked())["engine_data"] == {
        "routed_experts": "b64"
    }


# --- the table -----------------------------------------------------------------------------------------------------------


def test_the_table_names_every_worker_type() -> None:
    assert len(ROLES) == 12
    with pytest.raises(NodeError, match="unknown role"):
        find("poet")


@pytest.mark.parametrize("name", ROLES)
def test_every_role_s_own_health_check_is_a_request_that_it_takes(name: str) -> None:
    for role in (find(name), find(name, text=True)):
        (made,) = role.to_engine(Asked(role.canary_request(FACTS), FACTS, "ctx"))
        canary = role.canary(FACTS)
        assert made.get("call") == canary.get("call") and made.get("input_ids") == canary.get("input_ids")
        assert made.get("request") == canary.get("request")


@pytest.mark.parametrize("name", ["aggregated", "prefill", "decode", "embedding"])
def test_a_model_without_a_first_token_is_probed_with_another(name: str) -> None:
    bare = msgspec.structs.replace(FACTS, bos_token_id=None)
    assert find(name).canary(bare)["input_ids"] == [1]
