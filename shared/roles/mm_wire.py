"""What workers of one multimodal request tell each other, as dynamo.sglang 1.6.1 does (protocol.py, SglangMultimodalRequest).

An encode worker sends the request with expanded token ids, the grid and the number of tokens of each item, and where the
embeddings of all items together are. A decode worker sends the same on to its prefill worker.
"""

from typing import Annotated, Any, NoReturn

import msgspec
from msgspec import Meta

from shared.errors import Code, RequestError
from shared.roles.decode import HEALTH_CHECK
from shared.roles.media import DATA
from shared.roles.request import Count, typed
from shared.roles.role import Asked, Payload, Request

KEPT = "encoded"
"""Where it is in ``Asked.kept`` and in a payload."""
OWN = (
    DATA, "multi_modal_uuids", "mm_processor_kwargs", "media_io_kwargs", "mm_routing_info", "image_cache_scope", "bootstrap_info",
)  # fmt: skip
"""Fields of Dynamo's request that end at the encode worker: media, and what was decided for this very worker."""
OWN_EXTRA = ("messages", "formatted_prompt", "mm_hashes", "mm_hashes_by_modality")
ROUTED = ("priority", "cache_salt")
"""Routing hints that hold for any worker."""
DTYPES = ("float16", "bfloat16", "float32")
Size = Annotated[int, Meta(ge=1)]
Grid = Annotated[list[Size], Meta(min_length=3, max_length=3)]
"""Time, height, width, in patches."""


class Item(msgspec.Struct):
    """One image or video. ``num_mm_tokens``: its rows of the embeddings, and its placeholders in the prompt."""

    image_grid_thw: Grid | None = None
    video_grid_thw: Grid | None = None
    num_mm_tokens: Count | None = None
    second_per_grid_ts: float | None = None
    video_timestamps: list[float] | None = None


class Transfer(msgspec.Struct):
    """Where the embeddings are. ``serialized_request`` is the transfer mode's own."""

    embeddings_shape: list[Size]
    embedding_dtype_str: str
    serialized_request: Any


class Encoded(msgspec.Struct):
    """What comes beside the request."""

    multimodal_inputs: list[Item] = []
    embeddings_shape: list[Size] | None = None
    transfer_payload: Transfer | None = None


def unwrap(asked: Asked) -> None:
    """Make the request itself ``asked.request`` and keep what comes with it. Doing it twice does no harm.

    A request without an envelope is one without media. Raises RequestError(INVALID) for what can't belong together.
    """
    if KEPT in asked.kept:
        return
    outer = asked.request
    inner = outer.get("request")
    if isinstance(inner, dict) and isinstance(inner.get("request"), dict):  # DisaggSglangMultimodalRequest
        outer, inner = inner, inner["request"]
    found = typed(outer, Encoded)
    asked.kept[KEPT] = encoded(found)
    if isinstance(inner, dict):
        health = {HEALTH_CHECK: True} if asked.request.get(HEALTH_CHECK) else {}
        asked.request = {**inner, **health}


def encoded(found: Encoded) -> dict[str, Any] | None:
    """The same as plain data, None without media. Raises RequestError(INVALID)."""
    items = [item for item in found.multimodal_inputs if item.num_mm_tokens]
    if not items:
        return None
    if any((item.image_grid_thw is None) == (item.video_grid_thw is None) for item in items):
        _wrong("multimodal_inputs: each item has either image_grid_thw or video_grid_thw")
    transfer = found.transfer_payload
    if transfer is None:
        _wrong("transfer_payload is required")
    rows = sum(item.num_mm_tokens or 0 for item in items)
    shape = transfer.embeddings_shape
    if len(shape) != 2 or shape[0] != rows or found.embeddings_shape not in (None, shape):
        _wrong(f"embeddings of the shape {found.embeddings_shape or shape} and {shape} for {rows} tokens of media")
    if transfer.embedding_dtype_str.removeprefix("torch.") not in DTYPES:
        _wrong(f"embedding_dtype_str: expected one of {', '.join(DTYPES)}, got {transfer.embedding_dtype_str[:40]!r}")
    return {
        "multimodal_inputs": [msgspec.to_builtins(item) for item in items],
        "embeddings_shape": shape,
        "transfer_payload": msgspec.to_builtins(transfer),
    }


def _wrong(words: str) -> NoReturn:
    raise RequestError(Code.INVALID, f"invalid request: {words}")


def arguments(asked: Asked, *, transfers: bool = True) -> Payload:
    """What of it goes into a payload. ``transfers`` False: the engine needs the items' places, not their embeddings."""
    there = asked.kept.get(KEPT)
    if there is None:
        return {}
    if not transfers:
        return {KEPT: {**there, "transfer_payload": None}}
    # Samples of one request share what can be fetched once only.
    return {KEPT: {**there, "samples": asked.kept.get("samples", 1)}}


def request(asked: Asked, token_ids: list[int], made: dict[str, Any]) -> Request:
    """The envelope from an encode worker: ``made`` is what its engine said, {} without media."""
    inner = {name: value for name, value in asked.request.items() if name not in OWN}
    inner["token_ids"] = token_ids
    inner.setdefault("stop_conditions", {})
    inner.setdefault("sampling_options", {})
    if isinstance(routing := inner.get("routing"), dict):
        inner["routing"] = {name: value for name, value in routing.items() if name in ROUTED}
    if isinstance(extra := inner.get("extra_args"), dict):
        inner["extra_args"] = {name: value for name, value in extra.items() if name not in OWN_EXTRA}
    return {"request": inner, "multimodal_inputs": [], "embeddings_shape": None, "transfer_payload": None, **made}


def text(value: Request) -> str:
    """A request as workers of both kinds take it."""
    return msgspec.json.encode(value).decode()
