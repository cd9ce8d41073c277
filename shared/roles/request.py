"""The fields of Dynamo's token request that a worker reads, typed: a wrong one is named, never a crash later on.

Source: Dynamo 1.6.1, PreprocessedRequest (lib/llm/src/protocols/common/preprocessor.rs). Unknown fields are left alone.
"""

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from shared.errors import Code, RequestError

Count = Annotated[int, Meta(ge=0)]
MAX_SAMPLES = 128
"""Samples of one request (OpenAI's bound, which the frontend has too)."""


class StopConditions(msgspec.Struct):
    """``max_tokens`` None: until the end of the context."""

    max_tokens: Count | None = None
    min_tokens: Count | None = None
    stop_token_ids: list[int] | None = None
    stop_token_ids_hidden: list[int] | None = None
    ignore_eos: bool | None = None
    max_thinking_tokens: Any = None


class SamplingOptions(msgspec.Struct):
    """None: the engine's default."""

    n: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    guided_decoding: dict[str, Any] | None = None


class Routing(msgspec.Struct):
    """What the router has decided, and hints for it."""

    dp_rank: Count | None = None
    prefill_dp_rank: Count | None = None
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] | Annotated[float, Meta(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: str | None = None


class Bootstrap(msgspec.Struct):
    """Where a decode engine finds the KV cache of its request."""

    bootstrap_host: str | None = None
    bootstrap_port: Annotated[int, Meta(ge=0, lt=2**16)] | None = None
    bootstrap_room: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None


class TokenRequest(msgspec.Struct):
    """A generation request in token form."""

    token_ids: list[Count] = []
    model: str | None = None
    stop_conditions: StopConditions | None = None
    sampling_options: SamplingOptions | None = None
    output_options: dict[str, Any] | None = None
    routing: Routing | None = None
    bootstrap_info: Bootstrap | None = None
    annotations: list[str] | None = None
    extra_args: dict[str, Any] | None = None
    nvext: dict[str, Any] | None = None
    cache_salt: str | None = None


def read(request: dict[str, Any]) -> TokenRequest:
    """The request's fields. Raises RequestError(INVALID) naming the first wrong one."""
    from dynamo.common.utils.token_ids import token_ids_to_list

    tokens = request.get("token_ids")
    if not isinstance(tokens, list):
        try:
            tokens = [] if tokens is None else token_ids_to_list(tokens)
        except (ValueError, TypeError) as error:
            raise RequestError(Code.INVALID, f"invalid request: token_ids: {error}") from None
    return typed({**request, "token_ids": tokens}, TokenRequest)


T = TypeVar("T")


def typed(request: dict[str, Any], kind: type[T]) -> T:
    """The request's fields as that struct's. Raises RequestError(INVALID) naming the first wrong one."""
    try:
        return msgspec.convert(request, kind)
    except (msgspec.ValidationError, ValueError, RecursionError) as error:  # ValueError: half a surrogate
        raise RequestError(Code.INVALID, f"invalid request: {error}") from None
