"""What of a Dynamo request only SGLang's process can judge: thinking budget, reasoning gate, sessions, adapters.

It uses dynamo.sglang's own functions (1.6.1) on the fields that a role left in the payload's ``asks``.
"""

from collections.abc import Container
from typing import Any

from shared.errors import Code, RequestError

OPTIONAL = ("priority", "disagg_prefill_dp_rank", "mm_hashes")
"""Arguments that an older SGLang doesn't have and a request can do without."""


class Asks:
    """``adapters``: names of the LoRA adapters that are loaded now."""

    def __init__(self, engine: Any, server_args: Any, adapters: Container[str]) -> None:
        from dynamo.sglang._compat import filter_supported_async_generate_kwargs

        self._engine = engine
        self._server_args = server_args
        self._adapters = adapters
        self._supported = lambda arguments: filter_supported_async_generate_kwargs(engine, arguments)
        experts = getattr(server_args, "enable_return_routed_experts", False)
        self._always: dict[str, Any] = self._supported({"return_routed_experts": True}) if experts else {}

    def settle(self, payload: dict[str, Any]) -> None:
        """Turn ``asks`` into arguments of async_generate. Raises RequestError(INVALID)."""
        from dynamo.llm.exceptions import InvalidArgument
        from dynamo.sglang._compat import require_reasoning_kwargs
        from dynamo.sglang.agent_session import agent_session_kwargs
        from dynamo.sglang.thinking_budget import apply_thinking_budget, thinking_budget_requested

        asks = payload.pop("asks", {})
        try:
            payload["sampling_params"] = apply_thinking_budget(
                asks, payload["sampling_params"], self._server_args, engine=self._engine
            )
            budget = thinking_budget_requested(asks)
            payload.update(require_reasoning_kwargs(self._engine, asks, thinking_budget_requested=budget))
        except InvalidArgument as error:
            raise RequestError(Code.INVALID, str(error)) from None
        payload.update(agent_session_kwargs(self._engine, asks))
        payload.update(self._always)
        if (adapter := self.adapter(asks)) is not None:
            payload["lora_path"] = adapter
        if "priority" in payload:
            payload["priority"] = self.priority(payload["priority"])
        for name in OPTIONAL:
            if name in payload:
                payload.update(self._supported({name: payload.pop(name)}))
        if "routed_dp_rank" in payload and not self._supported({"routed_dp_rank": 0}):
            payload["data_parallel_rank"] = payload.pop("routed_dp_rank")
        for name in payload.keys() - self._supported(payload).keys():
            raise RequestError(Code.INVALID, f"not supported by this engine: {name}")

    def priority(self, value: int | None) -> int | None:
        """Dynamo serves higher values first; SGLang as it is told."""
        lowest_first = getattr(self._server_args, "schedule_low_priority_values_first", False)
        return -value if value is not None and lowest_first else value

    def adapter(self, asks: dict[str, Any]) -> str | None:
        """The adapter that the request's model name stands for."""
        model = asks.get("model")
        return model if isinstance(model, str) and model in self._adapters else None
