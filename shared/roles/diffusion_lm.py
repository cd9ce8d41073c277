"""Role ``diffusion_lm``: a diffusion language model (--dllm-algorithm; dynamo.sglang 1.6.1, DiffusionWorkerHandler)."""

from dataclasses import replace

from shared.errors import Code, RequestError
from shared.roles import request, tokens
from shared.roles.aggregated import AGGREGATED
from shared.roles.role import Asked, Payload

PASSED = ("input_ids", "sampling_params", "external_trace_header")
"""Denoising has no order of tokens: log probabilities, priorities and cache salts don't reach the engine."""


def to_engine(asked: Asked) -> list[Payload]:
    """Raises RequestError(INVALID) for a thinking budget."""
    read = request.read(asked.request)
    budgets = (
        read.stop_conditions and read.stop_conditions.max_thinking_tokens,
        asked.request.get("thinking_token_budget"),
        (read.nvext or {}).get("max_thinking_tokens"),
    )
    if any(budget is not None for budget in budgets):
        raise RequestError(Code.INVALID, "thinking_token_budget is unsupported by diffusion language model workers")
    tokens.check(read, asked)
    payload = tokens.payload_of(read, asked)
    return tokens.samples({name: payload[name] for name in PASSED if name in payload}, read.sampling_options, asked)


DIFFUSION_LM = replace(AGGREGATED, name="diffusion_lm", to_engine=to_engine)
