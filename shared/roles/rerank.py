"""Role ``rerank``: scores of documents for a query by a cross-encoder (dynamo.sglang 1.6.1, RerankWorkerHandler)."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from shared.errors import Code, RequestError
from shared.frames import EngineFacts, Output
from shared.roles.request import typed
from shared.roles.role import Asked, Chunk, Payload, Request, Role


class RerankRequest(msgspec.Struct):
    """SGLang's, as Dynamo passes it on."""

    model: str
    query: str
    documents: list[str]
    top_n: Annotated[int, Meta(ge=1)] | None = None
    return_documents: bool = True


def to_engine(asked: Asked) -> list[Payload]:
    """Raises RequestError(INVALID)."""
    read = typed(asked.request, RerankRequest)
    if not read.query.strip():
        raise RequestError(Code.INVALID, "Query cannot be empty or whitespace only")
    if not read.documents:
        raise RequestError(Code.INVALID, "Documents cannot be empty")
    if any(not document.strip() for document in read.documents):
        raise RequestError(Code.INVALID, "Each document cannot be empty or whitespace only")
    asked.kept["read"] = read
    payload: Payload = {
        "call": "embed",
        "text": [[read.query, document] for document in read.documents],
        "is_cross_encoder_request": True,
    }
    if asked.trace:
        payload["external_trace_header"] = asked.trace
    return [payload]


def to_dynamo(output: Output, index: int, asked: Asked) -> Chunk | None:
    """Best first; equal scores in the order of the documents. Raises RequestError(INTERNAL) when a score is missing."""
    read: RerankRequest = asked.kept["read"]
    meta = output.meta or {}
    scores, infos = meta.get("scores") or [], meta.get("infos") or []
    if len(scores) != len(read.documents):
        raise RequestError(Code.INTERNAL, f"SGLang returned {len(scores)} scores for {len(read.documents)} documents")
    ranked: list[dict[str, Any]] = []
    for number, score in enumerate(scores):
        entry: dict[str, Any] = {"score": score, "index": number}
        if read.return_documents:
            entry["document"] = read.documents[number]
        if number < len(infos):
            entry["meta_info"] = infos[number]
        ranked.append(entry)
    ranked.sort(key=lambda entry: -entry["score"])
    return ranked[: read.top_n]


def canary(facts: EngineFacts) -> Payload:
    return {"call": "embed", "text": [["health check", "health check"]], "is_cross_encoder_request": True}


def canary_request(facts: EngineFacts) -> Request:
    return {"model": facts.served_model_name, "query": "health check", "documents": ["health check"]}


RERANK = Role(
    name="rerank",
    worker_type="Aggregated",
    needs=(),
    model_input="Text",
    model_type="Rerank",
    to_engine=to_engine,
    to_dynamo=to_dynamo,
    canary=canary,
    canary_request=canary_request,
    generates=False,
)
