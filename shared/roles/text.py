"""Text mode (--use-sglang-tokenizer): SGLang renders and tokenises OpenAI's chat request, text comes out."""

import time
from dataclasses import replace
from typing import Any

from shared.errors import Code, RequestError
from shared.frames import EngineFacts, Output
from shared.roles import decode, media, tokens
from shared.roles.request import Bootstrap, Count, Routing, SamplingOptions, TokenRequest, typed
from shared.roles.role import Asked, Chunk, Payload, Request, Role

RENDERED = ("messages", "prompt", "text", "chat_template_kwargs", "chat_template_args")
"""Fields that the engine's tokenizer makes the prompt of."""


class ChatRequest(SamplingOptions):
    """What is read of OpenAI's request, as the frontend passes it on."""

    model: str | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    min_tokens: Count | None = None
    stop: str | list[str | int] | None = None
    stop_token_ids: list[int] | None = None
    routing: Routing | None = None
    bootstrap_info: Bootstrap | None = None
    nvext: dict[str, Any] | None = None


def text_mode(role: Role) -> Role:
    """The role with text in and out. RequestError(INVALID) for one that has tokens only by its nature."""

    def to_engine(asked: Asked) -> list[Payload]:
        return _to_engine(asked, disaggregated=role.worker_type == "Decode")

    return replace(
        role,
        model_input="Text",
        model_type="Chat",
        to_engine=to_engine,
        to_dynamo=to_dynamo,
        canary=lambda facts: {**_canary(facts), **(decode.fake_transfer(facts) if role.worker_type == "Decode" else {})},
        canary_request=lambda facts: _canary_request(role, facts),
    )


def _to_engine(asked: Asked, *, disaggregated: bool) -> list[Payload]:
    request = asked.request
    read = typed(request, ChatRequest)
    if not any(name in request for name in RENDERED[:3]):
        raise RequestError(Code.INVALID, "No input parameter found in request: expected messages, prompt or text")
    media.refuse({**request, "extra_args": {"messages": request.get("messages")}})
    sampling = SamplingOptions(**{name: getattr(read, name) for name in (*tokens.SAMPLING_FIELDS, "n", "seed")})
    sampling.guided_decoding = read.guided_decoding
    params = tokens.sampling_params(TokenRequest(sampling_options=sampling), asked.facts)
    params["max_new_tokens"] = read.max_tokens if read.max_tokens is not None else read.max_completion_tokens
    if read.min_tokens is not None:
        params["min_new_tokens"] = read.min_tokens
    params.update(_stop(read))
    if "stop_token_ids" in params:
        params["stop_token_ids"] = tokens.in_vocabulary(params["stop_token_ids"], asked.facts)
    prompt = {name: request[name] for name in RENDERED if request.get(name) is not None}
    payload: Payload = {"call": "text", "request": prompt, "sampling_params": params}
    payload.update(tokens.routing_arguments(TokenRequest(routing=read.routing)))
    if asks := {name: request[name] for name in tokens.ASKED if request.get(name)}:
        payload["asks"] = asks
    if (salt := tokens.cache_salt(request)) is not None:
        payload["cache_salt"] = salt
    if asked.trace:
        payload["external_trace_header"] = asked.trace
    if not disaggregated:
        return tokens.samples(payload, sampling, asked)
    decode.one_sample(TokenRequest(sampling_options=sampling), None)
    where = decode.handover(read.bootstrap_info)
    if read.routing is not None and read.routing.prefill_dp_rank is not None:
        where["disagg_prefill_dp_rank"] = read.routing.prefill_dp_rank
    return [{**payload, **where}]


def _stop(read: ChatRequest) -> dict[str, Any]:
    """Stop words, or token ids in their place; an empty list means none."""
    if isinstance(read.stop, str):
        return {"stop": read.stop}
    if read.stop and all(isinstance(word, str) for word in read.stop):
        return {"stop": read.stop}
    if read.stop and all(isinstance(word, int) for word in read.stop):
        return {"stop_token_ids": read.stop}
    return {"stop_token_ids": read.stop_token_ids} if read.stop_token_ids else {}


def to_dynamo(output: Output, index: int, asked: Asked) -> Chunk | None:
    """A chat completion chunk as OpenAI's."""
    finish = None if output.finish is None else tokens.finish_reason(output.finish)
    chunk: dict[str, Any] = {
        "id": asked.context_id,
        "created": int(time.time()),
        "choices": [
            {"index": index, "delta": {"role": "assistant", "content": output.text or ""}, "finish_reason": finish},
        ],
        "model": asked.facts.served_model_name,
        "object": "chat.completion.chunk",
    }
    nvext: dict[str, Any] = {}
    reason = None if output.finish is None else tokens.stop_reason(output.finish, asked.request)
    if reason is not None and _wants(asked.request, "stop_reason"):
        nvext["stop_reason"] = reason
    experts = (output.meta or {}).get("routed_experts")
    if experts is not None:
        nvext["routed_experts"] = experts
    if nvext:
        chunk["nvext"] = nvext
    return chunk


def _wants(request: Request, field: str) -> bool:
    """The client asked for an extra field of the answer (nvext.extra_fields)."""
    extra = request.get("extra_args")
    for source in (request.get("nvext"), extra.get("nvext") if isinstance(extra, dict) else None):
        fields = source.get("extra_fields") if isinstance(source, dict) else None
        if isinstance(fields, list) and field in fields:
            return True
    return False


def _canary(facts: EngineFacts) -> Payload:
    params = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": False}
    return {"call": "text", "request": {"prompt": "Test"}, "sampling_params": params}


def _canary_request(role: Role, facts: EngineFacts) -> Request:
    request = dict(role.canary_request(facts))
    request.pop("token_ids", None)
    return {**request, "prompt": "Test"}
