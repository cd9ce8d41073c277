"""A request's media in SGLang's terms: which kinds its model takes, the arguments for them, and what is wrong with them."""

import importlib.util
import re
from collections import Counter
from typing import Any

from procs.engine.adapter import pixels
from shared.blobs import BLOBS
from shared.errors import Code, RequestError

KINDS = ("image", "video", "audio")
"""SGLang's argument for a kind is named after it: ``image_data`` and so on."""
DECODERS = {"video": ("torchcodec", "decord"), "audio": ("torchcodec", "torchaudio")}
"""Packages with any of which SGLang 0.5.23 reads a kind. Without one it fails at each item, as if by a defect."""
UNREADABLE = re.compile(r"^An exception occurred while loading (?:(\w+) data at index (\d+)|multimodal data)")
"""How SGLang 0.5.23 begins when an item can't be decoded (base_processor.py)."""


def kinds(manager: Any) -> list[str]:
    """Kinds that this engine takes: its model's processor has a placeholder token for them (SGLang 0.5.23, mm_tokens), and
    this host a decoder.
    """
    if not getattr(manager.model_config, "is_multimodal", False):
        return []
    placeholders = _placeholders(manager)
    return [kind for kind in KINDS if (not placeholders or kind in placeholders) and _decodable(kind)]


def _decodable(kind: str) -> bool:
    return kind not in DECODERS or any(importlib.util.find_spec(package) is not None for package in DECODERS[kind])


def settle(payload: dict[str, Any], manager: Any) -> None:
    """Turn ``media`` and ``blobs`` into arguments of async_generate. Raises RequestError(INVALID) when the prompt has others."""
    named: list[str] = payload.pop("media", [])
    contents: list[bytes] = payload.pop(BLOBS, [])
    ids = payload.get("input_ids")
    if isinstance(ids, list):
        if named:
            _check_places(manager, ids, Counter(named))
        elif written := [kind for kind, token in _placeholders(manager).items() if token in ids]:
            raise RequestError(Code.INVALID, f"the prompt has a placeholder of type {written[0]}, the request has none of these")
    if named:
        pixels.bound(manager)
    for kind in KINDS:
        if found := [content for name, content in zip(named, contents, strict=True) if name == kind]:
            payload[f"{kind}_data"] = found


def _check_places(manager: Any, ids: list[int], given: Counter[str]) -> None:
    """The prompt has one place for each item, and no placeholder elsewhere. Raises RequestError(INVALID).

    SGLang 0.5.23 looks for places in the prompt's text, so also in what a user wrote. With more or fewer of them, or with a
    placeholder outside, its processor leaves items out, puts them elsewhere, or never answers.
    """
    tokens: Any = getattr(manager.mm_processor, "mm_tokens", None)
    if not hasattr(tokens, "get_combined_regex"):  # that model's processor has its own way
        return
    tokenizer = getattr(manager.mm_processor, "_tokenizer", None) or manager.tokenizer
    written = {kind: tokenizer.convert_ids_to_tokens(token) for kind, token in _placeholders(manager).items()}
    found: Counter[str] = Counter()
    for part in re.split(tokens.get_combined_regex(), tokenizer.decode(ids)):
        modality = tokens.get_modality_of_token(part)
        if modality is not None:
            found[modality.name.lower()] += 1
        for kind, text in written.items():
            if part.count(text) > (modality is not None):
                raise RequestError(Code.INVALID, f"the prompt has a placeholder of type {kind} that stands for none of these")
    for kind in KINDS:
        if found[kind] != given[kind]:
            raise RequestError(Code.INVALID, f"the prompt has {found[kind]} places of type {kind} for {given[kind]} of them")


def _placeholders(manager: Any) -> dict[str, int]:
    """Token ids by kind; empty for a text model, and for a processor that doesn't say."""
    tokens = getattr(getattr(manager, "mm_processor", None), "mm_tokens", None)
    found = {kind: getattr(tokens, f"{kind}_token_id", None) for kind in KINDS}
    return {kind: token for kind, token in found.items() if isinstance(token, int)}


def unreadable(error: BaseException) -> str:
    """What is wrong with the client's file, when that is what SGLang's error says; empty otherwise.

    SGLang 0.5.23 raises ValueError for what its decoders usually say, and RuntimeError for the rest.
    """
    where = UNREADABLE.match(str(error))
    cause: BaseException = error
    while (before := cause.__cause__ or cause.__context__) is not None:
        cause = before
    if where is None or isinstance(cause, (MemoryError, ImportError)):  # of this host
        return ""
    said = re.sub(r" ?<[^>]* at 0x[0-9a-f]+>", "", str(cause)) or type(cause).__name__
    item = f"{where[1].lower()} {int(where[2]) + 1}" if where[1] else "media"
    return f"{item}: damaged: {said[:200]}"
