"""One request of each kind (Payload's ``call``) in SGLang's terms: its arguments, and what its answers mean."""

import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from procs.engine.adapter import media
from procs.engine.adapter.asks import Asks
from procs.engine.adapter.embeddings import Embeddings
from shared.errors import Code, RequestError

META = ("prompt_tokens", "completion_tokens", "cached_tokens")
"""meta_info entries that a first and a last output carry."""
LOGPROB_META = ("output_token_logprobs", "output_top_logprobs", "input_token_logprobs", "input_top_logprobs")
"""meta_info entries that go along whenever SGLang fills them."""

Answer = dict[str, Any]
"""One answer of SGLang's stream."""


class Calls:
    """Makes SGLang's stream of answers for a payload."""

    def __init__(self, engine: Any, asks: Asks, embeddings: Embeddings | None = None) -> None:
        from dynamo.common.utils.input_params import InputParamManager

        self._engine = engine
        self._manager = engine.tokenizer_manager
        self._asks = asks
        self._embeddings = embeddings
        self.pictures: Callable[[list[Any], list[int]], Awaitable[None]] | None = None
        """Reads what frontends have decoded (Decoded.settle)."""
        self._prompts = InputParamManager(self._manager.tokenizer)

    async def stream(self, rid: str, payload: dict[str, Any]) -> AsyncIterator[Answer]:
        """SGLang's answers. Raises RequestError, ValueError or TypeError for a request that it can't serve."""
        match payload.pop("call", "generate"):
            case "native":
                return self._native(rid, payload)
            case "embed":
                return self._embed(rid, payload)
            case "text":
                prompt = self._prompts.get_input_param(payload.pop("request"), use_tokenizer=True)
                payload["prompt" if isinstance(prompt, str) else "input_ids"] = prompt
        if self._embeddings is not None and "encoded" in payload:
            await self._embeddings.settle(payload)
        else:
            unread = payload.pop("decoded", [])
            media.settle(payload, self._manager)
            if unread and self.pictures is not None:
                await self.pictures(payload["image_data"], unread)  # images come first
        self._asks.settle(payload)
        stream: AsyncIterator[Answer] = await self._engine.async_generate(**payload, rid=rid, stream=True)
        return stream

    def _native(self, rid: str, payload: dict[str, Any]) -> AsyncIterator[Answer]:
        from dynamo.sglang.engine_generate import build_native_generate_request

        body = {**payload["native"]}
        if "sampling_params" in payload:
            body["sampling_params"] = payload["sampling_params"]
        fields = payload["fields"]
        request = build_native_generate_request(
            body,
            input_ids=payload["input_ids"],
            request_id=payload.get("session_rid") or rid,
            priority=self._asks.priority(fields.pop("priority", None)),
            prefill_dp_rank=fields.pop("disagg_prefill_dp_rank", None),
            lora_path=self._asks.adapter(payload.get("asks", {})),
            **fields,
        )
        answers: AsyncIterator[Answer] = self._manager.generate_request(request, None)
        return answers

    async def _embed(self, rid: str, payload: dict[str, Any]) -> AsyncIterator[Answer]:
        """One answer for the whole batch."""
        from sglang.srt.managers.io_struct import EmbeddingReqInput

        given = payload.get("text") or payload.get("input_ids")
        self._check_texts(payload.get("text"))
        several = isinstance(given, list) and isinstance(given[0], (str, list))
        rids = [f"{rid}-{index}" for index in range(len(given))] if several and given is not None else rid
        async for answer in self._manager.generate_request(EmbeddingReqInput(**payload, rid=rids), None):
            yield _pooled(answer if isinstance(answer, list) else [answer], payload)

    def _check_texts(self, texts: Any) -> None:
        """SGLang's scheduler dies of an input without a token (0.5.23, layers/pooler.py). Raises RequestError(INVALID)."""
        for text in texts if isinstance(texts, list) else [texts]:
            if isinstance(text, str) and not text.strip() and not self._manager.tokenizer.encode(text):
                raise RequestError(Code.INVALID, "input: a text is empty")


def _pooled(answers: list[Answer], payload: dict[str, Any]) -> Answer:
    """Vectors as little-endian float32, or scores, in one answer of the shape that the others have."""
    infos = [answer["meta_info"] for answer in answers]
    meta: dict[str, Any] = {"prompt_tokens": sum(info.get("prompt_tokens", 0) for info in infos)}
    if payload.get("is_cross_encoder_request"):
        meta["scores"] = [_score(answer["embedding"]) for answer in answers]
        meta["infos"] = infos
    else:
        meta["vectors"] = [struct.pack(f"<{len(answer['embedding'])}f", *answer["embedding"]) for answer in answers]
    return {"pooled": meta, "meta_info": {"finish_reason": {"type": "stop"}}}


def _score(value: Any) -> float:
    found = value[0] if isinstance(value, list) and value else value
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise TypeError(f"a rerank score is {value!r}, not a number")
    return float(found)


def meta_of(answer: Answer, call: str, *, first: bool) -> dict[str, Any] | None:
    """What of an answer's metadata goes along with its tokens."""
    if "pooled" in answer:
        pooled: dict[str, Any] = answer["pooled"]
        return pooled
    info = answer["meta_info"]
    if call == "native":
        return {"native": {name: value for name, value in answer.items() if name not in ("output_ids", "text")}}
    last = info["finish_reason"] is not None
    meta: dict[str, Any] | None = {name: info.get(name) for name in META} if first or last else None
    if info.get("output_token_logprobs") or (meta is not None and info.get("input_token_logprobs")):
        meta = {**(meta or {}), **{name: info[name] for name in LOGPROB_META if info.get(name)}}
    if info.get("routed_experts") is not None:
        meta = {**(meta or {}), "routed_experts": info["routed_experts"]}
    return meta
