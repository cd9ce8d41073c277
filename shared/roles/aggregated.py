"""Role ``aggregated``: prefill and decode in one engine, tokens in, tokens out (dynamo.sglang 1.6.1, DecodeWorkerHandler)."""

import json
import re
from typing import Any

from shared.errors import Code, RequestError
from shared.frames import EngineFacts, Output
from shared.roles.role import Chunk, Payload, Request, Role

SAMPLING_FIELDS = (
    "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p",
)  # fmt: skip
"""Sampling options of the same name in Dynamo's request and SGLang's SamplingParams."""

UNSUPPORTED = ("multi_modal_data", "bootstrap_info")
"""Request fields of other roles: refused, never ignored."""


def to_engine(request: Request, facts: EngineFacts) -> list[Payload]:
    """Map a Dynamo token request to one SGLang payload a sample.

    ``n`` becomes separate requests: SGLang 0.5.23 gives its own samples new ids that can't be aborted. With a seed,
    sample i gets seed + i. Raises RequestError(INVALID) for what SGLang would only reject after tokenising.
    """
    tokens = request.get("token_ids")
    if not isinstance(tokens, list) or not tokens:
        raise RequestError(Code.INVALID, "token_ids: expected a non-empty list of token ids")
    for token in tokens:
        if type(token) is not int or not 0 <= token < facts.vocab_size:
            raise RequestError(Code.INVALID, f"token_ids: {token!r} is not a token id (0 to {facts.vocab_size - 1})")
    for field in UNSUPPORTED:
        if request.get(field):
            raise RequestError(Code.INVALID, f"{field}: this worker serves text generation only")
    sampling = request.get("sampling_options") or {}
    routing = request.get("routing") or {}
    payload: Payload = {"input_ids": tokens, "sampling_params": _sampling_params(request, sampling)}
    payload.update(_logprob_arguments(request.get("output_options") or {}))
    if routing.get("dp_rank") is not None:
        payload["routed_dp_rank"] = routing["dp_rank"]
    if routing.get("priority") is not None:
        payload["priority"] = int(routing["priority"])
    count = sampling.get("n") or 1
    if count == 1:
        return [payload]
    seed = sampling.get("seed")
    payloads = []
    for index in range(count):
        params = dict(payload["sampling_params"])
        if seed is not None:
            params["sampling_seed"] = seed + index
        payloads.append({**payload, "sampling_params": params})
    return payloads


def _sampling_params(request: Request, sampling: dict[str, Any]) -> dict[str, Any]:
    stop = request.get("stop_conditions") or {}
    stop_ids = set(stop.get("stop_token_ids_hidden") or ()) | set(stop.get("stop_token_ids") or ())
    params: dict[str, Any] = {field: sampling.get(field) for field in SAMPLING_FIELDS}
    params["sampling_seed"] = sampling.get("seed")
    params["min_new_tokens"] = stop.get("min_tokens")
    params["ignore_eos"] = stop.get("ignore_eos")
    params["stop_token_ids"] = sorted(stop_ids) or None
    params.update(_guided(sampling.get("guided_decoding")))
    params = {key: value for key, value in params.items() if value is not None}
    # None means "until EOS or the context's end" to SGLang; leaving it out would mean 128.
    params["max_new_tokens"] = stop.get("max_tokens")
    return params


def _guided(guided: dict[str, Any] | None) -> dict[str, Any]:
    """One guided-decoding constraint; Dynamo's frontend admits at most one."""
    if not guided:
        return {}
    if guided.get("json") is not None:
        return {"json_schema": json.dumps(guided["json"])}
    if guided.get("regex") is not None:
        return {"regex": guided["regex"]}
    if guided.get("choice"):
        # SGLang has no choice constraint; its regex matches in full, so an alternation is one.
        return {"regex": "(" + "|".join(re.escape(str(choice)) for choice in guided["choice"]) + ")"}
    if guided.get("grammar") is not None:
        return {"ebnf": guided["grammar"]}
    if guided.get("structural_tag") is not None:
        tag = guided["structural_tag"]
        return {"structural_tag": tag if isinstance(tag, str) else json.dumps(tag)}
    return {}


def _logprob_arguments(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("logprobs") is None and options.get("prompt_logprobs") is None:
        return {}
    from dynamo.common.backend.logprobs import build_sglang_logprob_kwargs

    return dict(build_sglang_logprob_kwargs(options))


def to_dynamo(output: Output, index: int, request: Request) -> Chunk:
    """Map an engine output to Dynamo's token chunk; usage rides on the first and the last chunk."""
    chunk: Chunk = {"index": index, "token_ids": output.token_ids}
    meta = output.meta
    if output.finish is not None:
        kind = str(output.finish.get("type"))
        # Dynamo's name for an abort; every other finish reason of SGLang's passes as it is.
        chunk["finish_reason"] = "cancelled" if kind.startswith("abort") else kind
        reason = _stop_reason(output.finish, request)
        if reason is not None:
            chunk["stop_reason"] = reason
    if meta is None:
        return chunk
    if meta.get("output_token_logprobs"):
        from dynamo.common.backend.logprobs import extract_from_sglang_meta

        options = request.get("output_options") or {}
        log_probs, top = extract_from_sglang_meta(
            meta, return_tokens_as_token_ids=bool(options.get("return_tokens_as_token_ids"))
        )
        if log_probs is not None:
            chunk["log_probs"] = log_probs
        if top is not None:
            chunk["top_logprobs"] = top
    prompt, completion = meta.get("prompt_tokens"), meta.get("completion_tokens")
    if prompt is not None and completion is not None:
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        if meta.get("cached_tokens") is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": meta["cached_tokens"]}
        chunk["completion_usage"] = usage
    if output.finish is not None:
        data: dict[str, Any] = {}
        if meta.get("input_token_logprobs"):
            from dynamo.common.backend.logprobs import extract_prompt_logprobs_from_sglang_meta

            prompt_logprobs = extract_prompt_logprobs_from_sglang_meta(meta)
            if prompt_logprobs is not None:
                data["prompt_logprobs"] = prompt_logprobs
        if prompt is not None:
            data["kv_cache_hit"] = {"prompt_tokens": prompt, "reused_tokens": meta.get("cached_tokens") or 0}
        if data:
            chunk["engine_data"] = data
    return chunk


def _stop_reason(finish: dict[str, Any], request: Request) -> Any | None:
    """SGLang's matched stop, when the client asked for it: a string, or one of its own stop token ids."""
    matched = finish.get("matched")
    if isinstance(matched, str):
        return matched
    wanted = set((request.get("stop_conditions") or {}).get("stop_token_ids") or ())
    if isinstance(matched, int) and not isinstance(matched, bool) and matched in wanted:
        return matched
    if isinstance(matched, list) and matched and all(token in wanted for token in matched):
        return matched
    return None


def canary(facts: EngineFacts) -> Payload:
    """One greedy token from BOS, as dynamo.sglang's SglangHealthCheckPayload."""
    start = facts.bos_token_id if facts.bos_token_id is not None else 1
    return {"input_ids": [start], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": False}}


def canary_request(facts: EngineFacts) -> Request:
    """dynamo.sglang 1.6.1's health check payload (SglangHealthCheckPayload)."""
    return {
        "token_ids": canary(facts)["input_ids"],
        "stop_conditions": {"max_tokens": 1, "ignore_eos": False},
        "sampling_options": {"temperature": 0.0, "top_p": 1.0, "top_k": -1},
        "eos_token_ids": [],
        "annotations": [],
    }


AGGREGATED = Role(
    name="aggregated",
    component="backend",
    worker_type="Aggregated",
    needs=(),
    model_input="Tokens",
    to_engine=to_engine,
    to_dynamo=to_dynamo,
    canary=canary,
    canary_request=canary_request,
)
