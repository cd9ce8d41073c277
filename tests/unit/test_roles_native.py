"""SGLang's own generate request through Dynamo: the body stays the client's, ids and routing are ours."""

from typing import Any

import pytest

from shared.errors import Code, RequestError
from shared.frames import Output
from shared.roles import find
from shared.roles.role import Asked
from tests.unit.role_bench import asked, only, said

ROLE = find("aggregated")
USAGE = {"prompt_tokens": 4, "cached_tokens": 3, "id": "internal"}


def native(body: dict[str, Any], **fields: Any) -> Asked:
    extra = {"sglang_tito": body, **fields.pop("extra_args", {})}
    return asked(extra_args=extra, **fields)


def test_the_body_goes_along_as_it_is_with_the_canonical_prompt() -> None:
    body = {"text": "hi", "return_hidden_states": True, "sampling_params": {"temperature": 0}}
    found = native(body, model="adapter", routing={"dp_rank": 1, "priority": 3, "cache_salt": "s"})
    found.trace = {"traceparent": "x"}
    made = only(ROLE, found)
    assert made == {
        "call": "native",
        "native": body,
        "input_ids": [5, 6],
        "fields": {"routed_dp_rank": 1, "priority": 3, "cache_salt": "s", "external_trace_header": {"traceparent": "x"}},
        "asks": {"model": "adapter"},
        "sampling_params": {"temperature": 0, "n": 1},
    }


@pytest.mark.parametrize("extra", [None, {}, {"sglang_tito": None}, {"sglang_tito": [1]}, {"other": {}}])
def test_anything_else_is_a_request_in_token_form(extra: Any) -> None:
    assert "call" not in only(ROLE, asked(extra_args=extra))


def test_without_sampling_parameters_sglang_s_defaults_hold() -> None:
    made = only(ROLE, native({}))
    assert "sampling_params" not in made and made["fields"] == {} and "asks" not in made


def test_the_body_s_own_salt_is_second_to_dynamo_s() -> None:
    assert only(ROLE, native({"cache_salt": "body"}))["fields"]["cache_salt"] == "body"
    assert only(ROLE, native({"cache_salt": "body"}, cache_salt="request"))["fields"]["cache_salt"] == "request"


def test_samples_are_requests_of_their_own() -> None:
    found = native({"sampling_params": {"n": 3, "temperature": 1}, "rid": "mine"})
    made = ROLE.to_engine(found)
    assert [p["sampling_params"] for p in made] == [{"n": 1, "temperature": 1}] * 3
    chunk = said(ROLE, Output("r", 0, [7], {"type": "stop"}, {"native": {"meta_info": dict(USAGE)}}), 2, found)
    answer = chunk["engine_data"]["sglang_response"]
    assert (answer["index"], answer["meta_info"]["id"]) == (2, "mine_2") and "kv_cache_hit" not in chunk["engine_data"]


def test_a_session_is_continued_by_the_id_that_the_client_knows() -> None:
    assert only(ROLE, native({"session_params": {"id": "s"}, "rid": "node-1"}))["session_rid"] == "node-1"
    assert only(ROLE, native({"session_params": {"id": "s"}}))["session_rid"] == "ctx"
    assert "session_rid" not in only(ROLE, native({"rid": "node-1"}))


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"sampling_params": []}, "sampling_params: expected an object"),
        ({"sampling_params": {"n": 0}}, "sampling_params.n"),
        ({"sampling_params": {"n": 129}}, "sampling_params.n"),
        ({"sampling_params": {"n": True}}, "sampling_params.n"),
        ({"sampling_params": {"n": "2"}}, "sampling_params.n"),
        ({"rid": 5}, "rid: expected a string"),
        ({"rid": ["a"]}, "rid: expected a string"),
    ],
)
def test_a_wrong_native_body_is_refused_by_name(body: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError) as caught:
        ROLE.to_engine(native(body))
    assert caught.value.code == Code.INVALID and named in caught.value.message


@pytest.mark.parametrize(("rid", "public"), [("mine", "mine"), ("", "ctx"), (None, "ctx")])
def test_the_answer_is_sglang_s_own_under_the_client_s_id(rid: Any, public: str) -> None:
    found = native({"rid": rid})
    only(ROLE, found)
    answer = {"meta_info": {**USAGE, "finish_reason": None}, "hidden_states": [1.0]}
    chunk = said(ROLE, Output("r", 0, [7], None, {"native": answer}, "hi"), 0, found)
    assert chunk == {
        "token_ids": [],
        "engine_data": {
            "sglang_response": {
                "meta_info": {**USAGE, "finish_reason": None, "id": public},
                "hidden_states": [1.0],
                "output_ids": [7],
                "text": "hi",
            }
        },
    }


def test_the_last_answer_reports_the_reuse() -> None:
    found = native({})
    only(ROLE, found)
    chunk = said(ROLE, Output("r", 0, [7], {"type": "stop"}, {"native": {"meta_info": dict(USAGE)}}), 0, found)
    assert chunk["engine_data"]["kv_cache_hit"] == {"prompt_tokens": 4, "reused_tokens": 3}


def test_an_output_without_sglang_s_answer_says_nothing() -> None:
    found = native({})
    only(ROLE, found)
    assert ROLE.to_dynamo(Output("r", 0, [], {"type": "abort"}), 0, found) is None


def test_prompt_and_media_are_checked_as_for_any_other() -> None:
    for found in (native({}, token_ids=[100]), native({}, multi_modal_data={"image_url": ["u"]})):
        with pytest.raises(RequestError) as caught:
            ROLE.to_engine(found)
        assert caught.value.code == Code.INVALID
