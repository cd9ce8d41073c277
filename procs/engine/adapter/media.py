"""A request's media in SGLang's terms: which kinds its model takes, and the arguments for them."""

from typing import Any

from shared.blobs import BLOBS
from shared.errors import Code, RequestError

KINDS = ("image", "video", "audio")
"""SGLang's argument for a kind is named after it: ``image_data`` and so on."""


def kinds(manager: Any) -> list[str]:
    """Kinds that this engine's model takes: its processor has a placeholder token for them (SGLang 0.5.23, mm_tokens)."""
    if not getattr(manager.model_config, "is_multimodal", False):
        return []
    placeholders = _placeholders(manager)
    return [kind for kind in KINDS if not placeholders or kind in placeholders]


def settle(payload: dict[str, Any], manager: Any) -> None:
    """Turn ``media`` and ``blobs`` into arguments of async_generate. Raises RequestError(INVALID) when the prompt has others.

    SGLang 0.5.23 expands one placeholder an item. Where their numbers differ its processor fails in ways that no client gets
    to know of.
    """
    named: list[str] = payload.pop("media", [])
    contents: list[bytes] = payload.pop(BLOBS, [])
    ids = payload.get("input_ids")
    for kind, token in _placeholders(manager).items():
        there, given = ids.count(token) if isinstance(ids, list) else 0, named.count(kind)
        if there != given and (there or given) and isinstance(ids, list):
            raise RequestError(Code.INVALID, f"the prompt has {there} placeholders of type {kind} for {given} of them")
    for kind in KINDS:
        if found := [content for name, content in zip(named, contents, strict=True) if name == kind]:
            payload[f"{kind}_data"] = found


def _placeholders(manager: Any) -> dict[str, int]:
    """Token ids by kind; empty for a text model, and for a processor that doesn't say."""
    tokens = getattr(getattr(manager, "mm_processor", None), "mm_tokens", None)
    found = {kind: getattr(tokens, f"{kind}_token_id", None) for kind in KINDS}
    return {kind: token for kind, token in found.items() if isinstance(token, int)}
