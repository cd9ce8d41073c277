"""Role ``mm_encode``: makes embeddings of a request's images and videos; the worker that generates answers in its place.

It is the model's face to the frontend, and registers as dynamo.sglang 1.6.1's does (init_multimodal.py). Text goes on as it is.
"""

import json
import struct
import zlib
from typing import Any

from shared.blobs import BLOBS
from shared.errors import Code, RequestError
from shared.frames import EngineFacts, Output
from shared.roles import media, mm_wire, native, request, tokens
from shared.roles.decode import HEALTH_CHECK
from shared.roles.role import Asked, Callee, Chunk, Payload, Request, Role

SIDE = 56
"""Pixels of the canary's picture: SGLang's processors take nothing smaller than two patches of 28."""


def to_engine(asked: Asked) -> list[Payload]:
    """One payload with all media; none for text. Raises RequestError(INVALID)."""
    if asked.request.get(HEALTH_CHECK):
        return [canary(asked.facts)]
    read = request.read(asked.request)
    tokens.check(read, asked)
    if native.body(asked) is not None:
        raise RequestError(Code.INVALID, "SGLang's own generate is not served through an encode worker")
    asked.kept["input_ids"] = read.token_ids
    found = media.arguments(asked)
    return [{"call": "encode", "input_ids": read.token_ids, **found}] if found else []


def to_dynamo(output: Output, index: int, asked: Asked) -> Chunk | None:
    """Its engine says what became of the media, then that they were fetched. A canary is answered by that."""
    meta = output.meta or {}
    if mm_wire.KEPT in meta:
        asked.kept[mm_wire.KEPT], asked.kept["input_ids"] = meta[mm_wire.KEPT], meta["input_ids"]
    if output.finish is not None and asked.request.get(HEALTH_CHECK):
        return {"token_ids": [], "finish_reason": tokens.finish_reason(output.finish)}
    return None


def to_worker(asked: Asked) -> str | None:
    """Dynamo's request, with what the engine has made of its media."""
    if asked.request.get(HEALTH_CHECK):
        return None
    return mm_wire.text(mm_wire.request(asked, asked.kept["input_ids"], asked.kept.get(mm_wire.KEPT) or {}))


def from_worker(chunk: Chunk, asked: Asked) -> Chunk | None:
    """The generating worker's chunk for the frontend. Raises RequestError(INTERNAL): dynamo.sglang has errors in chunks."""
    try:
        found: Any = json.loads(chunk) if isinstance(chunk, str) else chunk
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RequestError(Code.INTERNAL, f"the generating worker answered no object: {str(chunk)[:80]}")
    if found.get("finish_reason") == "error":
        raise RequestError(Code.INTERNAL, f"the generating worker failed: {found.get('error')}")
    # Empty text would be taken for what the token ids mean.
    return {name: value for name, value in found.items() if name != "finished" and not (name == "text" and not value)}


def picture() -> bytes:
    """A grey PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" + bytes(SIDE) + (b"\0" + b"\x80" * SIDE) * (SIDE - 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def canary(facts: EngineFacts) -> Payload:
    """A picture through the whole tower; nobody fetches what comes of it."""
    return {"call": "encode", "input_ids": [], "media": ["image"], BLOBS: [picture()], "keep": True}


def canary_request(facts: EngineFacts) -> Request:
    return {**tokens.canary_request(facts), HEALTH_CHECK: True}


MM_ENCODE = Role(
    name="mm_encode",
    worker_type="Encode",
    needs=(("Prefill", "Decode"), ("Aggregated",)),
    model_input="Tokens",
    model_type="",
    to_engine=to_engine,
    to_dynamo=to_dynamo,
    canary=canary,
    canary_request=canary_request,
    engine="encode",
    callee=Callee("backend", to_worker, from_worker),
    takes_media=True,
    generates=False,
)
