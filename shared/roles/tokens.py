"""Generation in token form: what every generating role shares of Dynamo's request and of SGLang's answer."""

import json
import re
from collections.abc import Iterable
from typing import Any

from shared.errors import Code, RequestError
from shared.frames import EngineFacts, Output
from shared.roles import media
from shared.roles.request import SamplingOptions, StopConditions, TokenRequest
from shared.roles.role import Asked, Payload, Request

SAMPLING_FIELDS = (
    "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p",
)  # fmt: skip
"""Sampling options of the same name in Dynamo's request and SGLang's SamplingParams."""
UNSET_DP_RANK = 2**32 - 1
"""An older router's "no rank" (dynamo.sglang 1.6.1, prefill_handler.py)."""
ASKED = ("model", "require_reasoning", "stop_conditions", "thinking_token_budget", "nvext", "agent_context")
"""Fields that go along in ``asks``."""
BYPASS_PREFILL = "x-bypass-remote-prefill"


def check(read: TokenRequest, asked: Asked) -> None:
    """Refuse what no worker can serve. Raises RequestError(INVALID)."""
    if not read.token_ids:
        raise RequestError(Code.INVALID, "token_ids: expected a non-empty list of token ids")
    largest = max(read.token_ids)
    if asked.facts.vocab_size and largest >= asked.facts.vocab_size:
        raise RequestError(Code.INVALID, f"token_ids: Token id {largest} is out of vocabulary")
    if BYPASS_PREFILL in (read.annotations or ()):
        raise RequestError(Code.INVALID, f"annotation {BYPASS_PREFILL!r}: SGLang does not support conditional disaggregation yet")
    media.check(asked)


def payload_of(read: TokenRequest, asked: Asked) -> Payload:
    """Everything of one sample's payload that does not depend on the role."""
    payload: Payload = {"input_ids": read.token_ids, "sampling_params": sampling_params(read, asked.facts)}
    payload.update(logprob_arguments(read.output_options or {}))
    payload.update(routing_arguments(read))
    if asks := {name: asked.request[name] for name in ASKED if asked.request.get(name)}:
        payload["asks"] = asks
    if (salt := cache_salt(asked.request)) is not None:
        payload["cache_salt"] = salt
    if asked.trace:
        payload["external_trace_header"] = asked.trace
    payload.update(media.arguments(asked))
    return payload


def samples(payload: Payload, sampling: SamplingOptions | None, asked: Asked) -> list[Payload]:
    """``n`` as separate requests: SGLang 0.5.23 gives its own samples new ids that can't be aborted.

    With a seed, sample i gets seed + i.
    """
    count = (sampling.n if sampling is not None else None) or 1
    asked.kept["samples"] = count
    url = upload_url(asked)
    if count == 1 and url is None:
        return [payload]
    seed = sampling.seed if sampling is not None else None
    payloads = []
    for index in range(count):
        params = dict(payload["sampling_params"])
        if seed is not None:
            params["sampling_seed"] = seed + index
        payloads.append({**payload, "sampling_params": params})
        if url is not None:
            payloads[-1]["upload"] = {"url": url, "index": index}
    return payloads


def upload_url(asked: Asked) -> str | None:
    """Where metadata goes instead of to the client (nvext.metadata_upload, --enable-rl). Raises RequestError(INVALID)."""
    if not asked.facts.uploads:
        return None
    from dynamo.common.metadata_upload import MetadataUploader

    try:
        uploader = MetadataUploader.from_backend_request(asked.request)
    except ValueError as error:
        raise RequestError(Code.INVALID, str(error)) from None
    return None if uploader is None else uploader.url


def sampling_params(read: TokenRequest, facts: EngineFacts) -> dict[str, Any]:
    """SGLang's SamplingParams (dynamo.sglang 1.6.1, _build_sampling_params)."""
    sampling, stop = read.sampling_options or SamplingOptions(), read.stop_conditions or StopConditions()
    # Without a tokenizer SGLang refuses min_new_tokens: Dynamo's decoder keeps the floor, so the engine may not stop before it.
    held_open = bool(stop.min_tokens) and facts.skip_tokenizer_init
    stop_ids = in_vocabulary({*(stop.stop_token_ids_hidden or ()), *(stop.stop_token_ids or ())}, facts)
    params: dict[str, Any] = {field: getattr(sampling, field) for field in SAMPLING_FIELDS}
    params["sampling_seed"] = sampling.seed
    params["min_new_tokens"] = None if held_open else stop.min_tokens
    params["ignore_eos"] = True if held_open else stop.ignore_eos
    params["stop_token_ids"] = None if held_open else stop_ids or None
    params.update(guided(sampling.guided_decoding))
    params = {key: value for key, value in params.items() if value is not None}
    # None means "until EOS or the context's end" to SGLang; leaving it out would mean 128.
    params["max_new_tokens"] = stop.max_tokens
    return params


def in_vocabulary(ids: Iterable[int], facts: EngineFacts) -> list[int]:
    """Token ids that can come at all: SGLang 0.5.23's scheduler dies of others (BatchedMinNewTokensPenalizer)."""
    return sorted(token for token in ids if token >= 0 and (not facts.vocab_size or token < facts.vocab_size))


def guided(options: dict[str, Any] | None) -> dict[str, Any]:
    """One guided-decoding constraint; Dynamo's frontend admits at most one. Raises RequestError(INVALID)."""
    if not options:
        return {}
    for name in ("regex", "grammar"):
        # SGLang would find out in its scheduler, which serves everybody.
        if not isinstance(options.get(name), str | None):
            raise RequestError(Code.INVALID, f"guided_decoding.{name}: expected a string, got {options[name]!r}")
    if options.get("json") is not None:
        from dynamo.common.utils.guided_json import reject_nonprogressing_guided_json_ref_cycles
        from dynamo.llm import HttpError

        try:
            reject_nonprogressing_guided_json_ref_cycles(options["json"])
            return {"json_schema": json.dumps(options["json"])}
        except HttpError as error:
            raise RequestError(Code.INVALID, str(error)) from None
        except (TypeError, ValueError, RecursionError) as error:  # msgpack has what JSON has not
            raise RequestError(Code.INVALID, f"guided_decoding.json: not JSON: {error}") from None
    if options.get("regex") is not None:
        return {"regex": options["regex"]}
    choices = options.get("choice")
    if isinstance(choices, list) and (given := [str(choice) for choice in choices if choice is not None]):
        # SGLang has no choice constraint; its regex matches in full, so an alternation is one.
        return {"regex": "(" + "|".join(re.escape(choice) for choice in given) + ")"}
    if options.get("grammar") is not None:
        return {"ebnf": options["grammar"]}
    if options.get("structural_tag") is not None:
        from dynamo.common.utils.structural_tag import serialize_structural_tag

        return {"structural_tag": serialize_structural_tag(options["structural_tag"])}
    return {}


def logprob_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """SGLang's arguments for log probabilities of tokens and prompt."""
    if options.get("logprobs") is None and options.get("prompt_logprobs") is None:
        return {}
    from dynamo.common.backend.logprobs import build_sglang_logprob_kwargs

    return dict(build_sglang_logprob_kwargs(options))


def routing_arguments(read: TokenRequest) -> dict[str, Any]:
    """The router's DP rank and priority: higher values first."""
    routing = read.routing
    arguments: dict[str, Any] = {}
    if routing is None:
        return arguments
    if routing.dp_rank is not None and routing.dp_rank != UNSET_DP_RANK:
        arguments["routed_dp_rank"] = routing.dp_rank
    if routing.priority is not None:
        arguments["priority"] = int(routing.priority)
    return arguments


def cache_salt(request: Request) -> str | None:
    """The first non-empty salt of the places that Dynamo looks at. Raises RequestError(INVALID) when it isn't text."""
    from dynamo.sglang.request_utils import request_cache_salt

    salt = request_cache_salt(request)
    if salt is not None and not isinstance(salt, str):
        raise RequestError(Code.INVALID, f"cache_salt: expected a string, got {salt!r}")
    return salt


def chunk_of(output: Output, index: int, asked: Asked, *, cache_report: bool) -> dict[str, Any] | None:
    """An engine output as Dynamo's token chunk; usage rides on the first and the last chunk.

    ``cache_report``: this worker measured how much of the prompt it had, which a router learns from.
    """
    chunk: dict[str, Any] = {"index": index, "token_ids": output.token_ids}
    meta = output.meta
    if output.finish is not None:
        chunk["finish_reason"] = finish_reason(output.finish)
        reason = stop_reason(output.finish, asked.request)
        if reason is not None:
            chunk["stop_reason"] = reason
    if meta is None:
        return chunk
    if meta.get("output_token_logprobs"):
        from dynamo.common.backend.logprobs import extract_from_sglang_meta

        options = asked.request.get("output_options") or {}
        log_probs, top = extract_from_sglang_meta(
            meta, return_tokens_as_token_ids=bool(options.get("return_tokens_as_token_ids"))
        )
        if log_probs is not None:
            chunk["log_probs"] = log_probs
        if top is not None:
            chunk["top_logprobs"] = top
    if (usage := usage_of(meta)) is not None:
        chunk["completion_usage"] = usage
    data: dict[str, Any] = {}
    if meta.get("routed_experts") is not None:
        data["routed_experts"] = meta["routed_experts"]
    if output.finish is not None:
        if meta.get("input_token_logprobs"):
            from dynamo.common.backend.logprobs import extract_prompt_logprobs_from_sglang_meta

            prompt_logprobs = extract_prompt_logprobs_from_sglang_meta(meta)
            if prompt_logprobs is not None:
                data["prompt_logprobs"] = prompt_logprobs
        # Of several samples none measures what was cached before the request came.
        if cache_report and asked.kept.get("samples", 1) == 1:
            data.update(cache_hit(meta))
    if data:
        chunk["engine_data"] = data
    return chunk


def finish_reason(finish: dict[str, Any]) -> str:
    """Dynamo's word for SGLang's finish reason."""
    kind = str(finish.get("type"))
    return "cancelled" if kind.startswith("abort") else kind


def usage_of(meta: dict[str, Any]) -> dict[str, Any] | None:
    """Dynamo's completion usage, in tokens."""
    prompt, completion = meta.get("prompt_tokens"), meta.get("completion_tokens")
    if prompt is None or completion is None:
        return None
    usage: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if meta.get("cached_tokens") is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": meta["cached_tokens"]}
    return usage


def cache_hit(meta: dict[str, Any]) -> dict[str, Any]:
    """What a router learns of this request's reuse, in tokens."""
    if meta.get("prompt_tokens") is None:
        return {}
    return {"kv_cache_hit": {"prompt_tokens": meta["prompt_tokens"], "reused_tokens": meta.get("cached_tokens") or 0}}


def stop_reason(finish: dict[str, Any], request: Request) -> Any | None:
    """SGLang's matched stop, when the client asked for it: a string, or one of its own stop token ids."""
    matched = finish.get("matched")
    if isinstance(matched, str):
        return matched
    wanted = user_stop_ids(request)
    if isinstance(matched, int) and not isinstance(matched, bool) and matched in wanted:
        return matched
    if isinstance(matched, list) and matched and all(token in wanted for token in matched):
        return matched
    return None


def user_stop_ids(request: Request) -> set[int]:
    """Stop token ids that the client named itself, in token form or in OpenAI's."""
    stop = request.get("stop_conditions")
    if isinstance(stop, dict):
        given = stop.get("stop_token_ids")
    else:
        stop = request.get("stop")
        numbers = isinstance(stop, list) and all(type(item) is int for item in stop)
        given = stop if numbers else request.get("stop_token_ids")
    return {token for token in given if type(token) is int} if isinstance(given, list) else set()


def canary_payload(facts: EngineFacts) -> Payload:
    """One greedy token from BOS, as dynamo.sglang's SglangHealthCheckPayload."""
    start = facts.bos_token_id if facts.bos_token_id is not None else 1
    return {"input_ids": [start], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": False}}


def canary_request(facts: EngineFacts) -> Request:
    """dynamo.sglang 1.6.1's health check payload (SglangHealthCheckPayload)."""
    return {
        "token_ids": canary_payload(facts)["input_ids"],
        "stop_conditions": {"max_tokens": 1, "ignore_eos": False},
        "sampling_options": {"temperature": 0.0, "top_p": 1.0, "top_k": -1},
        "eos_token_ids": [],
        "annotations": [],
    }
