"""Media of a request as roles pass them on: which kinds there are, who takes them, and in what order they go to the engine."""

from typing import NoReturn

from shared.blobs import BLOBS
from shared.errors import Code, RequestError
from shared.frames import EngineFacts
from shared.roles.role import Asked, Payload, Request

DATA = "multi_modal_data"
KINDS = {"image_url": "image", "video_url": "video", "audio_url": "audio"}
"""Kinds of media by their name in Dynamo's ``multi_modal_data``, in the order of SGLang's arguments."""
PARTS = {**KINDS, "input_audio": "audio"}
"""The same by the types of a message's parts (OpenAI)."""

COPIES_BYTES = 256 << 20
"""Of the media of several samples."""


def taken(request: Request, facts: EngineFacts) -> None:
    """Media that this model doesn't take are refused, which needs none of them. Raises RequestError(INVALID)."""
    for kind in sorted(named(request)):
        if kind not in facts.media:
            _refuse(kind)


def check(asked: Asked) -> None:
    """Media that this model or role doesn't take are refused, never ignored. Raises RequestError(INVALID)."""
    taken(asked.request, asked.facts)
    there = set(asked.media.kinds) if asked.media is not None else set()
    for kind in sorted(named(asked.request)):
        if kind not in there:
            raise RequestError(Code.INVALID, f"the messages have {kind} content, multi_modal_data has none")
    _copies(asked)


def _copies(asked: Asked) -> None:
    """The engine gets a sample's media with each sample, which are up to 128."""
    size = max(asked.media.held, sum(map(len, asked.media.blobs))) if asked.media is not None else 0
    options = asked.request.get("sampling_options")
    count = options.get("n") if isinstance(options, dict) else None
    if isinstance(count, int) and count > 1 and count * size > COPIES_BYTES:
        words = f"n: {count} samples with {size >> 20} MB of media each, {COPIES_BYTES >> 20} MB together at most"
        raise RequestError(Code.INVALID, words)


def refuse(request: Request) -> None:
    """For a role that takes none at all. Raises RequestError(INVALID)."""
    for kind in sorted(named(request)):
        _refuse(kind)


def _refuse(kind: str) -> NoReturn:
    name = next((name for name, found in PARTS.items() if found == kind), kind)
    words = f"Model does not accept {kind} input; received unsupported content type '{name}'."
    raise RequestError(Code.INVALID, words)


def named(request: Request) -> set[str]:
    """Kinds of media in the request, wherever it says so."""
    data = request.get(DATA)
    if isinstance(data, dict):
        found = {KINDS.get(name, str(name)) for name, items in data.items() if items}
    else:
        found = {DATA} if data else set()
    extra = request.get("extra_args")
    messages = (extra.get("messages") if isinstance(extra, dict) else None) or request.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind in PARTS:
                found.add(PARTS[kind])
    return found


def arguments(asked: Asked) -> Payload:
    """What of the media goes into a payload: ``media`` names the kind of each of ``blobs``."""
    if asked.media is None or not asked.media.blobs:
        return {}
    # A list of its own: the bytes are let go of when the engine has them.
    found: Payload = {"media": asked.media.kinds, BLOBS: list(asked.media.blobs)}
    return {**found, "decoded": asked.media.decoded} if asked.media.decoded else found


def hashes(asked: Asked) -> Payload:
    """The router's names of the media, which it finds cached blocks by; left out when they don't fit (dynamo.sglang 1.6.1)."""
    extra = asked.request.get("extra_args")
    if asked.media is None or not isinstance(extra, dict):
        return {}
    by_kind = extra.get("mm_hashes_by_modality")
    lists = [by_kind.get(kind) for kind in KINDS.values()] if isinstance(by_kind, dict) else []
    found = [name for names in lists if isinstance(names, list) for name in names] or extra.get("mm_hashes")
    fits = isinstance(found, list) and len(found) == len(asked.media.kinds) and all(isinstance(name, str) for name in found)
    return {"mm_hashes": found} if fits else {}
