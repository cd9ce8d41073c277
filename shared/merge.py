"""Two outputs of one request as one: how tokens that wait for a slow peer become a single chunk."""

from typing import Any

from shared.frames import Output

LISTS = ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs", "blobs")
"""Entries of ``meta`` that hold one item a token, and blobs; they are joined, everything else takes the newer value."""

NESTED = ("native", "meta_info")
"""Entries that hold such entries again: SGLang's own answer, and its meta_info."""


def merge(older: Output, newer: Output) -> Output:
    """Join two outputs of one stream, ``newer`` directly after ``older``. Changes and returns ``older``.

    Raises ValueError when tokens are missing between them.
    """
    if newer.offset != older.offset + len(older.token_ids):
        raise ValueError(f"tokens {older.offset + len(older.token_ids)} to {newer.offset} are missing")
    older.token_ids += newer.token_ids
    older.finish = newer.finish
    if newer.text is not None:
        older.text = (older.text or "") + newer.text
    if older.meta is None:
        older.meta = newer.meta
    elif newer.meta is not None:
        older.meta = _merge_meta(older.meta, newer.meta)
    return older


def _merge_meta(older: dict[str, Any], newer: dict[str, Any]) -> dict[str, Any]:
    merged = {**older, **newer}
    for name in LISTS:
        if older.get(name) and newer.get(name):
            merged[name] = [*older[name], *newer[name]]
    for name in NESTED:
        if isinstance(older.get(name), dict) and isinstance(newer.get(name), dict):
            merged[name] = _merge_meta(older[name], newer[name])
    return merged
