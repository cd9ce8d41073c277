"""Role ``decode``: continues a request whose prompt another engine has computed (dynamo.sglang 1.6.1, DecodeWorkerHandler)."""

from typing import Any

import msgspec

from shared.errors import Code, RequestError
from shared.frames import EngineFacts, Output
from shared.roles import native, request, tokens
from shared.roles.request import Bootstrap, TokenRequest
from shared.roles.role import Asked, Chunk, Payload, Request, Role

HEALTH_CHECK = "_HEALTH_CHECK"
"""Dynamo's mark of its own canary (dynamo.health_check)."""


def one_sample(read: TokenRequest, body: dict[str, Any] | None) -> None:
    """One bootstrap room carries one KV cache. Raises RequestError(INVALID) for more than one sample."""
    params = (body or {}).get("sampling_params")
    counts = (read.sampling_options and read.sampling_options.n, params.get("n") if isinstance(params, dict) else None)
    if any(count not in (None, 1) for count in counts):
        raise RequestError(
            Code.INVALID,
            "SGLang disaggregated serving supports only n=1. Use aggregated serving or send separate n=1 requests.",
        )


def handover(found: Bootstrap | None) -> dict[str, Any]:
    """Where the KV cache is. Raises RequestError(INTERNAL)."""
    if found is None or found.bootstrap_host is None or found.bootstrap_room is None:
        raise RequestError(Code.INTERNAL, "bootstrap_info is required for disaggregated decode but was not provided")
    return msgspec.to_builtins(found)  # type: ignore[no-any-return]


def to_engine(asked: Asked) -> list[Payload]:
    """Raises RequestError(INTERNAL) without bootstrap information: a router's mistake, not the client's."""
    read = request.read(asked.request)
    body = native.body(asked)
    one_sample(read, body)
    tokens.check(read, asked)
    where = handover(read.bootstrap_info)
    if read.routing is not None and read.routing.prefill_dp_rank is not None:
        where["disagg_prefill_dp_rank"] = read.routing.prefill_dp_rank
    if body is not None:
        return native.to_engine(body, read, asked, **where)
    return [{**tokens.payload_of(read, asked), **where}]


def to_dynamo(output: Output, index: int, asked: Asked) -> Chunk | None:
    # SGLang copies the prefill engine's cached_tokens: that one has reported them.
    if "native" in asked.kept:
        return native.to_dynamo(output, index, asked, cache_report=False)
    return tokens.chunk_of(output, index, asked, cache_report=False)


def fake_transfer(facts: EngineFacts) -> dict[str, Any]:
    """A bootstrap address at which SGLang skips the transfer; room 0 is DP rank 0 (SglangDisaggHealthCheckPayload)."""
    return {"bootstrap_host": facts.fake_bootstrap_host, "bootstrap_port": facts.bootstrap_port, "bootstrap_room": 0}


def canary(facts: EngineFacts) -> Payload:
    return {**tokens.canary_payload(facts), **fake_transfer(facts)}


def canary_request(facts: EngineFacts) -> Request:
    return {**tokens.canary_request(facts), "bootstrap_info": fake_transfer(facts), HEALTH_CHECK: True}


DECODE = Role(
    name="decode",
    worker_type="Decode",
    needs=(("Prefill",),),
    model_input="Tokens",
    model_type="",
    to_engine=to_engine,
    to_dynamo=to_dynamo,
    canary=canary,
    canary_request=canary_request,
    takes_media=True,
)
