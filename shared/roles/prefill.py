"""Role ``prefill``: computes prompts and hands the KV cache to a decode engine (dynamo.sglang 1.6.1, PrefillWorkerHandler).

Its stream ends when the transfer has: so a drain that waits for streams waits for transfers.
"""

import random
from typing import Any

from shared.frames import Output
from shared.roles import native, request, tokens
from shared.roles.decode import HEALTH_CHECK, canary, canary_request, one_sample
from shared.roles.role import Asked, Chunk, Payload, Role

ROOMS = 2**63
"""SGLang's bootstrap rooms: 63 bits."""


def to_engine(asked: Asked) -> list[Payload]:
    """One token of one sample; the room is the router's, or a random one."""
    inner = asked.request.get("request")
    if isinstance(inner, dict):  # DisaggPreprocessedRequest
        asked.request = {**inner, "sampling_options": asked.request.get("sampling_params") or inner.get("sampling_options")}
    read = request.read(asked.request)
    body = native.body(asked)
    one_sample(read, body)
    tokens.check(read, asked)
    found = read.bootstrap_info
    where = {
        "bootstrap_host": (found and found.bootstrap_host) or asked.facts.bootstrap_host,
        "bootstrap_port": (found and found.bootstrap_port) or asked.facts.bootstrap_port,
        "bootstrap_room": random.randrange(ROOMS) if found is None or found.bootstrap_room is None else found.bootstrap_room,
    }
    asked.kept["bootstrap"] = where
    one = {"n": 1, "max_new_tokens": 1}
    if body is not None:
        return native.to_engine(body, read, asked, overrides=one, **where)
    # Of a prompt's log probabilities nothing is handed on.
    read.output_options = {"logprobs": (read.output_options or {}).get("logprobs")}
    payload = tokens.payload_of(read, asked)
    # The stop conditions are decode's.
    for name in ("min_new_tokens", "ignore_eos", "stop_token_ids"):
        payload["sampling_params"].pop(name, None)
    payload["sampling_params"].update(one)
    return [{**payload, **where}]


def opening(asked: Asked, payload: Payload) -> Chunk | None:
    """Where decode finds the cache. A canary has no decode: its answer is the engine's."""
    if asked.request.get(HEALTH_CHECK):
        return None
    return {"token_ids": [], "text": None, "finish_reason": None, "disaggregated_params": asked.kept["bootstrap"]}


def to_dynamo(output: Output, index: int, asked: Asked) -> Chunk | None:
    if asked.request.get(HEALTH_CHECK):
        return tokens.chunk_of(output, index, asked, cache_report=False)
    if output.finish is None:
        return None
    meta: dict[str, Any] = output.meta or {}
    report = tokens.cache_hit(meta.get("native", {}).get("meta_info", meta))
    return {"token_ids": [], "engine_data": report} if report else None


PREFILL = Role(
    name="prefill",
    worker_type="Prefill",
    needs=(("Decode",),),
    model_input="Tokens",
    model_type="Prefill",
    to_engine=to_engine,
    to_dynamo=to_dynamo,
    canary=canary,
    canary_request=canary_request,
    takes_media=True,
    opening=opening,
)
