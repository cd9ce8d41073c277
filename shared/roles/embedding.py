"""Role ``embedding``: vectors of texts or token ids (dynamo.sglang 1.6.1, EmbeddingWorkerHandler)."""

import base64
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from shared.errors import Code, RequestError
from shared.frames import EngineFacts, Output
from shared.roles.request import typed
from shared.roles.role import Asked, Chunk, Payload, Request, Role

FLOAT = 4
"""Bytes of one dimension: little-endian float32."""


class EmbeddingRequest(msgspec.Struct):
    """OpenAI's, as Dynamo passes it on. ``dimensions`` keeps the first ones."""

    model: str
    input: str | list[Any]
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = "float"


def to_engine(asked: Asked) -> list[Payload]:
    """Texts and token ids take different arguments of SGLang's. Raises RequestError(INVALID)."""
    read = typed(asked.request, EmbeddingRequest)
    given = read.input
    if not given:
        raise RequestError(Code.INVALID, "input: expected a text, token ids, or a list of either; it is empty")
    payload: Payload = {"call": "embed"}
    if isinstance(given, str) or all(isinstance(item, str) for item in given):
        payload["text"] = given
    else:
        batch = given if all(isinstance(item, list) for item in given) else [given]
        for item in batch:
            if not item or any(type(token) is not int or token < 0 for token in item):
                raise RequestError(Code.INVALID, "input: expected a text, token ids, or a list of either")
            if (largest := max(item)) >= asked.facts.vocab_size:
                raise RequestError(Code.INVALID, f"Token id {largest} is out of vocabulary")
        payload["input_ids"] = given
    if asked.trace:
        payload["external_trace_header"] = asked.trace
    asked.kept.update(model=read.model, dimensions=read.dimensions)
    return [payload]


def to_dynamo(output: Output, index: int, asked: Asked) -> Chunk | None:
    """Vectors leave as base64, which the frontend turns into numbers for a client that wants them.

    Raises RequestError(INVALID) for more dimensions than the model has.
    """
    meta = output.meta or {}
    wanted = asked.kept["dimensions"]
    data = []
    for number, vector in enumerate(meta.get("vectors") or ()):
        if wanted is not None and wanted * FLOAT > len(vector):
            raise RequestError(Code.INVALID, f"dimensions={wanted} exceeds model embedding dimension {len(vector) // FLOAT}")
        kept = vector if wanted is None else vector[: wanted * FLOAT]
        data.append({"object": "embedding", "embedding": base64.b64encode(kept).decode("ascii"), "index": number})
    prompt = meta.get("prompt_tokens") or 0
    usage = {"prompt_tokens": prompt, "total_tokens": prompt}
    return {"object": "list", "data": data, "model": asked.kept["model"], "usage": usage}


def canary(facts: EngineFacts) -> Payload:
    return {"call": "embed", "input_ids": [facts.bos_token_id if facts.bos_token_id is not None else 1]}


def canary_request(facts: EngineFacts) -> Request:
    return {"model": facts.served_model_name, "input": canary(facts)["input_ids"]}


EMBEDDING = Role(
    name="embedding",
    worker_type="Aggregated",
    needs=(),
    model_input="Text",
    model_type="Embedding",
    to_engine=to_engine,
    to_dynamo=to_dynamo,
    canary=canary,
    canary_request=canary_request,
    generates=False,
)
