"""What image and video requests have in common: sizes, seeds, where their files go, and how an answer holds what was made."""

import hashlib
import random
import re
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from msgspec import Meta

from shared.errors import Code, RequestError
from shared.frames import EngineFacts
from shared.roles import media
from shared.roles.role import Asked, Payload, Role

ENGINE = "diffuse"
"""What the engine's process builds for these roles (Role.engine)."""
REFERENCE = "input_reference"
PLACE = "place"
"""In an output's metadata, beside its blob: ``{"url": ...}`` or ``{"b64_json": ...}``, which the agent has made of the blob."""
PATHS = "paths"
"""In Asked.kept, one a sample: the file that the blob becomes under --media-output-fs-url; None: base64 in the answer."""
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Scale = Annotated[float, Meta(ge=0, le=1000)]
"""Of guidance. 0 is 0, and no word for the default."""
SAFE = re.compile(r"[A-Za-z0-9_@+-][A-Za-z0-9_.@+-]{0,127}")
"""A client's word that may be a part of a path and of a URL as it is."""
NAMED_SEEDS = 1_000_000
"""A request without a seed gets one up to this (dynamo.sglang 1.6.1)."""


def size(text: str, facts: EngineFacts) -> tuple[int, int]:
    """Width and height of ``WxH``. Raises RequestError(INVALID), also past --media-max-megapixels."""
    found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if found is None:
        raise RequestError(Code.INVALID, f"size must be '<width>x<height>', got {text[:40]!r}")
    width, height = int(found[1]), int(found[2])
    if not width or not height:
        raise RequestError(Code.INVALID, f"size: width and height must be at least 1, got {text!r}")
    most = facts.max_pixels
    if most is not None and width * height > most:
        raise RequestError(Code.INVALID, f"size: {width} x {height} pixels, {most} in all at most")
    return width, height


def seed(given: int | None) -> int:
    """The given one, or any."""
    return random.randint(0, NAMED_SEEDS) if given is None else given


def safe(word: str) -> str:
    """A client's word as a part of a path: itself where it may be one, otherwise a name that stands for it alone."""
    return word if SAFE.fullmatch(word) else f"x-{hashlib.sha256(word.encode('utf-8', 'replace')).hexdigest()[:32]}"


def reference(asked: Asked, given: str | None) -> Payload:
    """The fetched picture that a request starts from, for its payload. Raises RequestError(INVALID): the model takes none."""
    if given is None:
        return {}
    if not given.strip():
        raise RequestError(Code.INVALID, f"{REFERENCE} must be a non-empty string")
    if "image" not in asked.facts.media:
        raise RequestError(Code.INVALID, f"{REFERENCE}: this model makes pictures of text alone")
    return media.arguments(asked)


def wanted(request: Mapping[str, Any], facts: EngineFacts) -> dict[str, Any] | None:
    """A request's reference as media that an agent fetches (shared.roles.media); None when there is nothing to fetch."""
    given = request.get(REFERENCE)
    if not isinstance(given, str) or not given.strip() or "image" not in facts.media:
        return None
    return {"image_url": [{"Url": given}]}


def canary(params: dict[str, Any]) -> Payload:
    """One step of a small picture."""
    fixed = {"prompt": "a canary", "negative_prompt": None, "num_inference_steps": 1, "seed": 0}
    return {"call": ENGINE, "params": {**fixed, **params}}


role = partial(Role, worker_type="Aggregated", needs=(), model_input="Text", engine=ENGINE, takes_media=True, generates=False)
"""A role that generates media: what all of them have, the rest is to be given."""
