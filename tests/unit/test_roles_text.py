"""Text mode: what the engine's tokenizer renders, stop words, and OpenAI chunks."""

from typing import Any

import pytest

from shared.errors import Code, RequestError
from shared.frames import Output
from shared.roles import find
from tests.unit.role_bench import BOOTSTRAP, FACTS, only, plain, said

TEXT = find("aggregated", text=True)
DECODE = find("decode", text=True)
MESSAGES = [{"role": "user", "content": "hi"}]


def payload(**fields: Any) -> dict[str, Any]:
    return only(TEXT, plain(**{"messages": MESSAGES, **fields}))


def refusal(**fields: Any) -> str:
    with pytest.raises(RequestError) as caught:
        TEXT.to_engine(plain(**fields))
    assert caught.value.code == Code.INVALID
    return caught.value.message


def test_what_the_prompt_is_made_of_goes_to_the_engine_and_nothing_else() -> None:
    found = payload(chat_template_kwargs={"enable_thinking": False}, tools=None, user="u", prompt=None)
    assert found == {
        "call": "text",
        "request": {"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": False}},
        "sampling_params": {"max_new_tokens": None},
    }
    assert only(TEXT, plain(prompt="hi"))["request"] == {"prompt": "hi"}
    assert only(TEXT, plain(text="hi"))["request"] == {"text": "hi"}


def test_no_prompt_at_all_is_refused() -> None:
    assert "No input parameter" in refusal(model="m")


def test_lengths_sampling_and_constraints() -> None:
    params = payload(
        max_tokens=5, max_completion_tokens=9, min_tokens=2, temperature=0.5, top_k=4, seed=3, guided_decoding={"regex": "a"}
    )["sampling_params"]
    assert params == {
        "max_new_tokens": 5, "min_new_tokens": 2, "temperature": 0.5, "top_k": 4, "sampling_seed": 3, "regex": "a",
    }  # fmt: skip
    assert payload(max_completion_tokens=9)["sampling_params"]["max_new_tokens"] == 9


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"stop": "END"}, {"stop": "END"}),
        ({"stop": ["A", "B"]}, {"stop": ["A", "B"]}),
        ({"stop": [7, 8]}, {"stop_token_ids": [7, 8]}),
        ({"stop": [], "stop_token_ids": [9]}, {"stop_token_ids": [9]}),
        ({"stop": "END", "stop_token_ids": [9]}, {"stop": "END"}),
        ({"stop_token_ids": [9, 100]}, {"stop_token_ids": [9]}),
        ({"stop_token_ids": []}, {}),
        ({"stop": None}, {}),
    ],
)
def test_stop_words_or_token_ids_in_their_place(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    params = payload(**fields)["sampling_params"]
    assert {name: params[name] for name in params if name.startswith("stop")} == expected


def test_samples_have_seeds_of_their_own() -> None:
    made = TEXT.to_engine(plain(messages=MESSAGES, n=2, seed=4))
    assert [p["sampling_params"]["sampling_seed"] for p in made] == [4, 5]


def test_routing_salt_trace_and_what_only_the_engine_can_judge() -> None:
    found = plain(messages=MESSAGES, routing={"dp_rank": 1, "priority": 2, "cache_salt": "s"}, model="m", thinking_token_budget=5)
    found.trace = {"traceparent": "x"}
    made = only(TEXT, found)
    assert (made["routed_dp_rank"], made["priority"], made["cache_salt"]) == (1, 2, "s")
    assert made["external_trace_header"] == {"traceparent": "x"}
    assert made["asks"] == {"model": "m", "thinking_token_budget": 5}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": "a"}, "stop_token_ids"),
        ({"temperature": "hot"}, "temperature"),
        ({"routing": {"dp_rank": -1}}, "dp_rank"),
        ({"guided_decoding": {"regex": 5}}, "guided_decoding.regex"),
        ({"multi_modal_data": {"image_url": ["u"]}}, "does not accept"),
        ({"messages": [{"content": [{"type": "video_url"}]}]}, "does not accept"),
        ({"messages": "x"}, "messages"),
        ({"messages": [5]}, "messages"),
    ],
)
def test_a_wrong_chat_request_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    assert named in refusal(**{"messages": MESSAGES, **fields})


def test_a_decode_in_text_mode_goes_to_its_prefill() -> None:
    made = only(DECODE, plain(messages=MESSAGES, bootstrap_info=BOOTSTRAP, routing={"prefill_dp_rank": 1}))
    assert {name: made[name] for name in BOOTSTRAP} == BOOTSTRAP and made["disagg_prefill_dp_rank"] == 1
    with pytest.raises(RequestError, match="n=1") as caught:
        DECODE.to_engine(plain(messages=MESSAGES, bootstrap_info=BOOTSTRAP, n=2))
    assert caught.value.code == Code.INVALID
    assert DECODE.canary(FACTS)["bootstrap_host"] == FACTS.fake_bootstrap_host
    assert "bootstrap_host" not in TEXT.canary(FACTS)


def test_chunks_are_openai_s() -> None:
    chunk = said(TEXT, Output("r", 0, [7], None, None, "he"), 1, plain())
    assert (chunk["id"], chunk["model"], chunk["object"]) == ("ctx", "m", "chat.completion.chunk")
    assert chunk["choices"] == [{"index": 1, "delta": {"role": "assistant", "content": "he"}, "finish_reason": None}]
    assert "nvext" not in chunk
    last = said(TEXT, Output("r", 1, [], {"type": "length"}, {"routed_experts": "b64"}), 0, plain())
    assert last["choices"][0]["delta"]["content"] == "" and last["choices"][0]["finish_reason"] == "length"
    assert last["nvext"] == {"routed_experts": "b64"}


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"nvext": {"extra_fields": ["stop_reason"]}}, True),
        ({"extra_args": {"nvext": {"extra_fields": ["stop_reason"]}}}, True),
        ({"nvext": {"extra_fields": ["other"]}}, False),
        ({"nvext": {"extra_fields": "stop_reason"}}, False),
        ({"extra_args": "x"}, False),
        ({}, False),
    ],
)
def test_the_stop_reason_is_shown_to_who_asks_for_it(fields: dict[str, Any], shown: bool) -> None:
    chunk = said(TEXT, Output("r", 0, [], {"type": "stop", "matched": "END"}), 0, plain(**fields))
    assert ("nvext" in chunk) is shown and chunk.get("nvext", {"stop_reason": "END"}) == {"stop_reason": "END"}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"stop": [7]}, 7),
        ({"stop_token_ids": [7]}, 7),
        ({"stop": ["a"], "stop_token_ids": [7]}, 7),
        ({"stop_token_ids": [8]}, None),
    ],
)
def test_stop_ids_of_an_openai_request_count_as_the_client_s(fields: dict[str, Any], reason: Any) -> None:
    asked = plain(nvext={"extra_fields": ["stop_reason"]}, **fields)
    chunk = said(TEXT, Output("r", 0, [], {"type": "stop", "matched": 7}), 0, asked)
    assert chunk.get("nvext", {}).get("stop_reason") == reason


def test_text_mode_is_registered_as_text() -> None:
    assert (TEXT.model_input, TEXT.model_type, TEXT.generates) == ("Text", "Chat", True)
    assert "token_ids" not in TEXT.canary_request(FACTS) and TEXT.canary_request(FACTS)["prompt"] == "Test"
