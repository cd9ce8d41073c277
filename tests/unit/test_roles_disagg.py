"""Prefill and decode: where the KV cache is, what is left to whom, and who reports its reuse."""

from typing import Any

import pytest

from shared.errors import Code, RequestError
from shared.frames import Output
from shared.roles import find
from shared.roles.prefill import ROOMS
from shared.roles.role import Asked
from tests.unit.role_bench import BOOTSTRAP, FACTS, asked, only, plain, said

PREFILL, DECODE = find("prefill"), find("decode")
USAGE = {"prompt_tokens": 2, "completion_tokens": 1, "cached_tokens": 1}


def failure(role: Any, found: Asked) -> RequestError:
    with pytest.raises(RequestError) as caught:
        role.to_engine(found)
    return caught.value


# --- prefill -------------------------------------------------------------------------------------------------------------


def test_a_prefill_makes_one_token_and_leaves_the_stop_conditions_to_decode() -> None:
    found = asked(
        stop_conditions={"max_tokens": 50, "min_tokens": 3, "stop_token_ids": [7], "ignore_eos": True},
        sampling_options={"temperature": 0.5, "seed": 3},
        output_options={"logprobs": 2, "prompt_logprobs": 1},
    )
    made = only(PREFILL, found)
    assert made["sampling_params"] == {"temperature": 0.5, "sampling_seed": 3, "n": 1, "max_new_tokens": 1}
    assert made["top_logprobs_num"] == 2 and "logprob_start_len" not in made


def test_a_prefill_has_its_own_address_and_a_room_of_its_own_choice() -> None:
    made = [only(PREFILL, asked()) for _ in range(3)]
    assert {(p["bootstrap_host"], p["bootstrap_port"]) for p in made} == {("192.0.2.1", 8998)}
    assert len({p["bootstrap_room"] for p in made}) == 3 and all(0 <= p["bootstrap_room"] < ROOMS for p in made)


def test_a_prefill_takes_the_router_s_room_also_when_it_is_0() -> None:
    assert only(PREFILL, asked(bootstrap_info={"bootstrap_room": 0}))["bootstrap_room"] == 0
    made = only(PREFILL, asked(bootstrap_info=BOOTSTRAP))
    assert {name: made[name] for name in BOOTSTRAP} == BOOTSTRAP


def test_a_prefill_reads_the_request_inside_a_router_s_envelope() -> None:
    inner = {"token_ids": [8, 9], "sampling_options": {"temperature": 0.1}, "bootstrap_info": BOOTSTRAP}
    made = only(PREFILL, plain(request=inner, sampling_params={"temperature": 0.7}))
    assert made["input_ids"] == [8, 9] and made["sampling_params"]["temperature"] == 0.7 and made["bootstrap_room"] == 77
    assert only(PREFILL, plain(request=inner))["sampling_params"]["temperature"] == 0.1


def test_the_opening_says_where_decode_finds_the_cache() -> None:
    found = asked()
    made = only(PREFILL, found)
    where = {name: made[name] for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room")}
    assert PREFILL.opening(found, made) == {
        "token_ids": [],
        "text": None,
        "finish_reason": None,
        "disaggregated_params": where,
    }


def test_a_prefill_says_nothing_but_the_reuse_at_its_end() -> None:
    found = asked()
    only(PREFILL, found)
    assert PREFILL.to_dynamo(Output("r", 0, [7], None, dict(USAGE)), 0, found) is None
    assert PREFILL.to_dynamo(Output("r", 0, [7], {"type": "length"}, dict(USAGE)), 0, found) == {
        "token_ids": [],
        "engine_data": {"kv_cache_hit": {"prompt_tokens": 2, "reused_tokens": 1}},
    }
    assert PREFILL.to_dynamo(Output("r", 0, [7], {"type": "length"}, None), 0, found) is None


def test_a_native_prefill_reports_its_reuse_too() -> None:
    found = asked(extra_args={"sglang_tito": {"sampling_params": {"max_new_tokens": 9}}})
    made = only(PREFILL, found)
    assert made["sampling_params"] == {"n": 1, "max_new_tokens": 1}
    assert made["fields"]["bootstrap_host"] == "192.0.2.1" and "bootstrap_room" in made["fields"]
    output = Output("r", 0, [7], {"type": "length"}, {"native": {"meta_info": dict(USAGE)}})
    chunk = PREFILL.to_dynamo(output, 0, found)
    assert chunk is not None and chunk["engine_data"]["kv_cache_hit"]["reused_tokens"] == 1


def test_a_prefill_s_canary_answers_as_an_engine_and_opens_nothing() -> None:
    found = Asked(PREFILL.canary_request(FACTS), FACTS, "ctx")
    made = only(PREFILL, found)
    assert (made["bootstrap_host"], made["bootstrap_room"]) == ("2.2.2.2", 0)
    assert PREFILL.opening(found, made) is None
    assert said(PREFILL, Output("r", 0, [7], {"type": "length"}), 0, found)["token_ids"] == [7]


# --- decode --------------------------------------------------------------------------------------------------------------


def test_a_decode_goes_to_the_prefill_that_it_is_told() -> None:
    made = only(DECODE, asked(bootstrap_info=BOOTSTRAP, routing={"prefill_dp_rank": 0}))
    assert {name: made[name] for name in BOOTSTRAP} == BOOTSTRAP and made["disagg_prefill_dp_rank"] == 0
    assert "disagg_prefill_dp_rank" not in only(DECODE, asked(bootstrap_info=BOOTSTRAP))


@pytest.mark.parametrize("given", [None, {}, {"bootstrap_host": "h"}, {"bootstrap_room": 1}])
@pytest.mark.parametrize("text", [False, True])
def test_a_decode_without_a_prefill_is_the_router_s_mistake(given: Any, text: bool) -> None:
    error = failure(find("decode", text=text), asked(bootstrap_info=given, prompt="hi"))
    assert error.code == Code.INTERNAL and "bootstrap_info is required" in error.message


def test_a_decode_reports_no_reuse_but_usage() -> None:
    found = asked(bootstrap_info=BOOTSTRAP)
    only(DECODE, found)
    chunk = said(DECODE, Output("r", 0, [7], {"type": "stop"}, dict(USAGE)), 0, found)
    assert chunk["completion_usage"]["total_tokens"] == 3 and "engine_data" not in chunk


@pytest.mark.parametrize("role", [PREFILL, DECODE])
@pytest.mark.parametrize(
    "fields",
    [{"sampling_options": {"n": 2}}, {"extra_args": {"sglang_tito": {"sampling_params": {"n": 2}}}}],
)
def test_one_room_carries_one_sample(role: Any, fields: dict[str, Any]) -> None:
    error = failure(role, asked(bootstrap_info=BOOTSTRAP, **fields))
    assert error.code == Code.INVALID and "n=1" in error.message


def test_a_native_decode_goes_to_its_prefill_too() -> None:
    found = asked(bootstrap_info=BOOTSTRAP, routing={"prefill_dp_rank": 1}, extra_args={"sglang_tito": {}})
    made = only(DECODE, found)
    assert made["call"] == "native" and made["fields"] == {**BOOTSTRAP, "disagg_prefill_dp_rank": 1}
    output = Output("r", 0, [7], {"type": "stop"}, {"native": {"meta_info": dict(USAGE)}})
    assert "kv_cache_hit" not in said(DECODE, output, 0, found)["engine_data"]


def test_a_decode_s_canary_transfers_nothing() -> None:
    made = only(DECODE, Asked(DECODE.canary_request(FACTS), FACTS, "ctx"))
    assert (made["bootstrap_host"], made["bootstrap_room"]) == (FACTS.fake_bootstrap_host, 0)
    assert DECODE.canary(FACTS)["bootstrap_host"] == FACTS.fake_bootstrap_host


def test_who_needs_whom() -> None:
    assert (PREFILL.needs, PREFILL.worker_type) == ((("Decode",),), "Prefill")
    assert (DECODE.needs, DECODE.worker_type) == ((("Prefill",),), "Decode")
    assert find("prefill", text=True) is PREFILL, "a prefill has the frontend's tokens in any case"
