"""Requests in SGLang's terms, and what of its answers goes along with the tokens."""

import asyncio
import struct
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from procs.engine.adapter.asks import Asks
from procs.engine.adapter.calls import Calls, _pooled, meta_of
from shared.errors import RequestError

RID = "a" * 32


class Tokenizer:
    """A word is a token."""

    chat_template = ""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return "|".join(message["content"] for message in messages)


class Engine:
    """Remembers what it is asked, and answers as told."""

    def __init__(self, *answers: Any, tokenizer: Any = None) -> None:
        self.answers = answers
        self.asked: list[Any] = []
        self.tokenizer_manager = SimpleNamespace(tokenizer=tokenizer, generate_request=self._generate)

    async def async_generate(self, **arguments: Any) -> AsyncIterator[Any]:
        return self._generate(arguments, None)

    async def _generate(self, request: Any, _: Any) -> AsyncIterator[Any]:
        self.asked.append(request)
        for answer in self.answers:
            yield answer


def call(engine: Engine, payload: dict[str, Any], adapters: tuple[str, ...] = (), **server_args: Any) -> list[Any]:
    calls = Calls(engine, Asks(engine, SimpleNamespace(**server_args), adapters))

    async def main() -> list[Any]:
        return [answer async for answer in await calls.stream(RID, payload)]

    return asyncio.run(main())


# --- requests ------------------------------------------------------------------------------------------------------------


def test_tokens_go_to_the_engine_as_its_own_arguments() -> None:
    engine = Engine("answer")
    assert call(engine, {"input_ids": [5], "sampling_params": {}, "priority": 2}) == ["answer"]
    (asked,) = engine.asked
    assert asked == {
        "input_ids": [5],
        "sampling_params": {},
        "priority": 2,
        "require_reasoning": False,
        "rid": RID,
        "stream": True,
    }


def test_text_is_rendered_by_the_engine_s_own_tokenizer() -> None:
    engine = Engine(tokenizer=Tokenizer())
    chat = {"messages": [{"content": "a"}, {"content": "b"}], "chat_template_kwargs": {"enable_thinking": False}}
    call(engine, {"call": "text", "request": chat, "sampling_params": {}})
    call(engine, {"call": "text", "request": {"prompt": "one three"}, "sampling_params": {}})
    assert engine.asked[0]["prompt"] == "a|b" and "request" not in engine.asked[0]
    assert engine.asked[1]["input_ids"] == [3, 5]


def test_text_without_a_tokenizer_is_a_bad_request() -> None:
    with pytest.raises(ValueError, match="Tokenizer is not available"):
        call(Engine(), {"call": "text", "request": {"prompt": "a"}, "sampling_params": {}})


def native(body: dict[str, Any], adapters: tuple[str, ...] = (), low_first: bool = False, **payload: Any) -> Any:
    engine = Engine()
    made = {"call": "native", "native": body, "input_ids": [5, 6], "fields": {}, **payload}
    call(engine, made, adapters, schedule_low_priority_values_first=low_first)
    return engine.asked[0]


def test_a_native_body_keeps_what_is_its_own_and_gets_our_id_prompt_and_routing() -> None:
    body = {"rid": "client", "text": None, "return_hidden_states": True, "priority": 99, "sampling_params": {"n": 3}}
    asked = native(
        body,
        ("a",),
        fields={"routed_dp_rank": 1, "cache_salt": "s", "bootstrap_room": 7},
        sampling_params={"n": 1},
        asks={"model": "a"},
    )
    assert (asked.rid, asked.input_ids, asked.stream, asked.return_hidden_states) == (RID, [5, 6], True, True)
    assert (asked.routed_dp_rank, asked.cache_salt, asked.bootstrap_room, asked.lora_path) == (1, "s", 7, "a")
    assert asked.priority is None and asked.sampling_params == {"n": 1} and body["sampling_params"] == {"n": 3}


def test_a_native_request_s_priority_is_the_router_s_in_sglang_s_direction() -> None:
    assert native({}, fields={"priority": 4}).priority == 4
    assert native({}, low_first=True, fields={"priority": 4}).priority == -4


def test_a_native_session_goes_on_under_the_client_s_id() -> None:
    assert native({"session_params": {"id": "s"}}, session_rid="node-1").rid == "node-1"


def test_a_native_body_that_is_wrong_is_a_bad_request() -> None:
    with pytest.raises(ValueError, match="return_logprob"):
        native({"return_logprob": "perhaps"})


@pytest.mark.parametrize(
    ("given", "rid"),
    [
        ({"text": "a"}, RID),
        ({"input_ids": [5, 6]}, RID),
        ({"text": ["a", "b"]}, [f"{RID}-0", f"{RID}-1"]),
        ({"input_ids": [[5], [6]]}, [f"{RID}-0", f"{RID}-1"]),
        ({"text": [["q", "a"]], "is_cross_encoder_request": True}, [f"{RID}-0"]),
    ],
)
def test_each_text_of_a_batch_has_an_id_of_its_own(given: dict[str, Any], rid: Any) -> None:
    engine = Engine([{"embedding": [0.5], "meta_info": {"prompt_tokens": 2}}], tokenizer=Tokenizer())
    (answer,) = call(engine, {"call": "embed", **given})
    assert engine.asked[0].rid == rid and answer["meta_info"] == {"finish_reason": {"type": "stop"}}


@pytest.mark.parametrize("given", [" ", ["a", "\t"]])
def test_a_text_without_a_token_never_reaches_the_scheduler(given: Any) -> None:
    engine = Engine(tokenizer=Tokenizer())
    with pytest.raises(RequestError, match="a text is empty"):
        call(engine, {"call": "embed", "text": given})
    assert engine.asked == []


# --- answers -------------------------------------------------------------------------------------------------------------


def test_vectors_are_packed_and_prompts_are_added_up() -> None:
    answers: list[dict[str, Any]] = [
        {"embedding": [0.5, -1.0], "meta_info": {"prompt_tokens": 2}},
        {"embedding": [2.0], "meta_info": {}},
    ]
    found = _pooled(answers, {})["pooled"]
    assert found == {"prompt_tokens": 2, "vectors": [struct.pack("<2f", 0.5, -1.0), struct.pack("<f", 2.0)]}


@pytest.mark.parametrize(("value", "score"), [(0.5, 0.5), ([0.5], 0.5), ([1, 2], 1.0)])
def test_scores_are_numbers_or_the_first_of_a_list(value: Any, score: float) -> None:
    info = {"prompt_tokens": 3, "id": "x"}
    found = _pooled([{"embedding": value, "meta_info": info}], {"is_cross_encoder_request": True})
    assert found["pooled"] == {"prompt_tokens": 3, "scores": [score], "infos": [info]}
    assert meta_of(found, "embed", first=True) is found["pooled"]


@pytest.mark.parametrize("value", [[], None, True, "0.5", [None], {"a": 1}])
def test_what_is_no_score_is_an_error(value: Any) -> None:
    with pytest.raises(TypeError, match="not a number"):
        _pooled([{"embedding": value, "meta_info": {}}], {"is_cross_encoder_request": True})


USAGE = {"prompt_tokens": 4, "completion_tokens": 1, "cached_tokens": 0}
INFO = {**USAGE, "id": RID, "finish_reason": None}


def test_usage_rides_on_the_first_and_the_last_output_alone() -> None:
    assert meta_of({"meta_info": INFO}, "generate", first=True) == USAGE
    assert meta_of({"meta_info": INFO}, "generate", first=False) is None
    assert meta_of({"meta_info": {**INFO, "finish_reason": {"type": "stop"}}}, "text", first=False) == USAGE


def test_log_probabilities_of_tokens_always_and_of_the_prompt_with_the_usage() -> None:
    output = {"output_token_logprobs": [[-1, 5, None]], "output_top_logprobs": []}
    prompt = {"input_token_logprobs": [[None, 5, None]]}
    assert meta_of({"meta_info": {**INFO, **output}}, "generate", first=False) == {"output_token_logprobs": [[-1, 5, None]]}
    assert meta_of({"meta_info": {**INFO, **prompt}}, "generate", first=False) is None
    assert meta_of({"meta_info": {**INFO, **prompt}}, "generate", first=True) == {**USAGE, **prompt}


def test_routed_experts_go_along_whenever_they_are_there() -> None:
    info = {**INFO, "routed_experts": "b64"}
    assert meta_of({"meta_info": info}, "generate", first=False) == {"routed_experts": "b64"}
    assert meta_of({"meta_info": info}, "generate", first=True) == {**USAGE, "routed_experts": "b64"}


def test_a_native_answer_goes_along_whole_but_for_what_travels_as_tokens_and_text() -> None:
    answer = {"text": "hi", "output_ids": [5], "meta_info": INFO, "hidden_states": [1]}
    for first in (True, False):
        assert meta_of(answer, "native", first=first) == {"native": {"meta_info": INFO, "hidden_states": [1]}}
