"""What only SGLang's process can judge of a request: thinking budget, reasoning, sessions, adapter, priority, old engines."""

from types import SimpleNamespace
from typing import Any

import pytest

from procs.engine.adapter.asks import Asks
from shared.errors import Code, RequestError


class Engine:
    """An engine of today, as far as its signature goes."""

    tokenizer_manager = SimpleNamespace()

    async def async_generate(
        self, input_ids: Any = None, prompt: Any = None, sampling_params: Any = None, rid: Any = None, stream: bool = False,
        priority: Any = None, routed_dp_rank: Any = None, disagg_prefill_dp_rank: Any = None, lora_path: Any = None,
        session_id: Any = None, parent_session_id: Any = None, require_reasoning: bool = False, cache_salt: Any = None,
        return_routed_experts: bool = False,
    ) -> None: ...  # fmt: skip


class OldEngine:
    """One that has only what was always there."""

    tokenizer_manager = SimpleNamespace()

    async def async_generate(
        self,
        input_ids: Any = None,
        sampling_params: Any = None,
        rid: Any = None,
        stream: bool = False,
        data_parallel_rank: Any = None,
    ) -> None: ...


def settled(payload: dict[str, Any], engine: Any = None, adapters: tuple[str, ...] = (), **server_args: Any) -> dict[str, Any]:
    made = {"input_ids": [5], "sampling_params": {"max_new_tokens": 5}, **payload}
    Asks(engine or Engine(), SimpleNamespace(**server_args), adapters).settle(made)
    return made


def refusal(payload: dict[str, Any], engine: Any = None, **server_args: Any) -> str:
    with pytest.raises(RequestError) as caught:
        settled(payload, engine, **server_args)
    assert caught.value.code == Code.INVALID
    return caught.value.message


def test_a_request_that_asks_for_nothing_stays_as_it_is() -> None:
    assert settled({}) == {"input_ids": [5], "sampling_params": {"max_new_tokens": 5}, "require_reasoning": False}


# --- thinking budget -----------------------------------------------------------------------------------------------------

BUDGET = {"stop_conditions": {"max_thinking_tokens": 7}}


@pytest.mark.parametrize(
    ("asks", "server", "named"),
    [
        (BUDGET, {}, "requires SGLang --enable-strict-thinking"),
        (BUDGET, {"enable_strict_thinking": True}, "requires an SGLang --reasoning-parser"),
        (
            BUDGET,
            {"enable_strict_thinking": True, "reasoning_parser": "qwen3", "skip_tokenizer_init": True},
            "unavailable with --skip-tokenizer-init",
        ),
        ({"thinking_token_budget": 7}, {}, "unavailable with --use-sglang-tokenizer"),
        ({"nvext": {"max_thinking_tokens": 7}}, {}, "unavailable with --use-sglang-tokenizer"),
        ({"stop_conditions": {"max_thinking_tokens": -1}}, {}, "between 0 and 4294967295"),
        ({"stop_conditions": {"max_thinking_tokens": True}}, {}, "between 0 and 4294967295"),
        ({"thinking_token_budget": "7"}, {}, "between 0 and 4294967295"),
    ],
)
def test_a_thinking_budget_that_can_t_be_kept_is_refused(asks: dict[str, Any], server: dict[str, Any], named: str) -> None:
    assert named in refusal({"asks": asks}, **server)


def test_a_thinking_budget_goes_to_the_sampler_when_the_request_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo.sglang.thinking_budget._token_filter_is_active", lambda _: True)
    server: dict[str, Any] = {"enable_strict_thinking": True, "reasoning_parser": "qwen3"}
    made = settled({"asks": {**BUDGET, "require_reasoning": True}}, **server)
    assert made["sampling_params"]["custom_params"] == {"thinking_budget": 7} and made["require_reasoning"] is True
    quiet = settled({"asks": BUDGET}, **server)
    assert "custom_params" not in quiet["sampling_params"] and quiet["require_reasoning"] is False
    reason = {"asks": {**BUDGET, "require_reasoning": True}}
    assert "supports per-request require_reasoning" in refusal(reason, OldEngine(), **server)


def test_reasoning_without_a_budget_is_done_without_where_the_engine_has_no_gate() -> None:
    assert settled({"asks": {"require_reasoning": True}})["require_reasoning"] is True
    assert "require_reasoning" not in settled({"asks": {"require_reasoning": True}}, OldEngine())


# --- sessions, adapters, priority ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "ids"),
    [
        ({"session_id": " s ", "parent_session_id": "p"}, {"session_id": "s", "parent_session_id": "p"}),
        ({"session_id": 5, "parent_session_id": "p"}, {"parent_session_id": "p"}),
        ({"session_id": "  "}, {}),
        ("s", {}),
    ],
)
def test_well_formed_session_ids_go_along(context: Any, ids: dict[str, str]) -> None:
    made = settled({"asks": {"agent_context": context}})
    assert {name: made[name] for name in ("session_id", "parent_session_id") if name in made} == ids
    assert made.keys() & {"asks", "agent_context"} == set()
    assert "session_id" not in settled({"asks": {"agent_context": context}}, OldEngine())


@pytest.mark.parametrize(("model", "path"), [("a", "a"), ("base", None), (["a"], None), (None, None)])
def test_the_model_s_name_is_an_adapter_s_when_one_of_that_name_is_loaded(model: Any, path: str | None) -> None:
    assert settled({"asks": {"model": model}}, adapters=("a", "b")).get("lora_path") == path


def test_an_adapter_is_looked_up_anew_for_each_request() -> None:
    adapters: dict[str, int] = {}
    asks = Asks(Engine(), SimpleNamespace(), adapters)
    assert asks.adapter({"model": "a"}) is None
    adapters["a"] = 1
    assert asks.adapter({"model": "a"}) == "a"


@pytest.mark.parametrize(("lowest_first", "priority"), [(False, 3), (True, -3)])
def test_higher_priorities_are_served_first_whichever_way_sglang_counts(lowest_first: bool, priority: int) -> None:
    assert settled({"priority": 3}, schedule_low_priority_values_first=lowest_first)["priority"] == priority


def test_what_an_old_engine_doesn_t_have_is_left_out_when_a_request_can_do_without() -> None:
    wishes = {"priority": 3, "disagg_prefill_dp_rank": 1, "routed_dp_rank": 2}
    made = settled(wishes)
    assert (made["priority"], made["disagg_prefill_dp_rank"], made["routed_dp_rank"]) == (3, 1, 2)
    assert settled(wishes, OldEngine()) == {"input_ids": [5], "sampling_params": {"max_new_tokens": 5}, "data_parallel_rank": 2}


@pytest.mark.parametrize("name", ["cache_salt", "lora_path", "bootstrap_room"])
def test_what_a_request_can_t_do_without_is_refused_by_name(name: str) -> None:
    assert refusal({name: "x"}, OldEngine()) == f"not supported by this engine: {name}"


def test_routed_experts_are_asked_for_when_the_operator_wants_them() -> None:
    assert settled({}, enable_return_routed_experts=True)["return_routed_experts"] is True
    assert "return_routed_experts" not in settled({}, OldEngine(), enable_return_routed_experts=True)
