"""Role ``image``: pictures of texts (/v1/images/generations and edits; dynamo.sglang 1.6.1, ImageDiffusionWorkerHandler)."""

import logging
import time
import uuid
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shared.frames import EngineFacts, Output
from shared.roles import diffusion
from shared.roles.diffusion import Scale, Seed
from shared.roles.request import typed
from shared.roles.role import Asked, Chunk, Payload, Request

MAX_SAMPLES = 10
"""Pictures of one request (OpenAI's bound)."""
MAX_STEPS = 50
"""More count as so many, with a warning in the log (dynamo.sglang 1.6.1)."""
GUIDANCE = 7.5
SIZE = "1024x1024"
CANARY_SIZE = 512


class ImageNvExt(msgspec.Struct):
    """NVIDIA's part of a request. None: the default."""

    negative_prompt: str | None = None
    num_inference_steps: Annotated[int, Meta(ge=1)] | None = None
    guidance_scale: Scale | None = None
    seed: Seed | None = None


class ImageRequest(msgspec.Struct):
    """OpenAI's, as Dynamo passes it on. ``size``: WxH, None or ``auto`` for SIZE."""

    prompt: str
    model: str
    n: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] | None = 1
    size: str | None = SIZE
    response_format: Literal["url", "b64_json"] | None = "url"
    user: str | None = None
    input_reference: str | None = None
    nvext: ImageNvExt | None = None


def to_engine(asked: Asked) -> list[Payload]:
    """One payload a picture; picture i has seed + i. Raises RequestError(INVALID)."""
    read = typed(asked.request, ImageRequest)
    more = read.nvext or ImageNvExt()
    width, height = diffusion.size(SIZE if read.size is None or read.size == "auto" else read.size, asked.facts)
    steps = more.num_inference_steps or MAX_STEPS
    if steps > MAX_STEPS:
        logging.warning("num_inference_steps=%d: %d at most, so it is %d", steps, MAX_STEPS, MAX_STEPS)
    params = {
        "prompt": read.prompt,
        "negative_prompt": more.negative_prompt,
        "width": width,
        "height": height,
        "num_inference_steps": min(steps, MAX_STEPS),
        "guidance_scale": GUIDANCE if more.guidance_scale is None else more.guidance_scale,
    }
    first, given = diffusion.seed(more.seed), diffusion.reference(asked, read.input_reference)
    count = read.n or 1
    user, context = (diffusion.safe(word) for word in (read.user or asked.context_id, asked.context_id))
    stored = read.response_format == "url"
    asked.kept[diffusion.PATHS] = [
        f"users/{user}/generations/{context}/{uuid.uuid4()}.png" if stored else None for _ in range(count)
    ]
    return [{"call": diffusion.ENGINE, "params": {**params, "seed": first + i}, **given} for i in range(count)]


def to_dynamo(output: Output, index: int, asked: Asked) -> Chunk | None:
    """A chunk a picture: the frontend makes one answer of them."""
    place = (output.meta or {}).get(diffusion.PLACE)
    if place is None:
        return None
    data = {"url": None, "b64_json": None, "revised_prompt": None, **place}
    return {"created": int(time.time()), "data": [data]}


def canary(facts: EngineFacts) -> Payload:
    return diffusion.canary({"width": CANARY_SIZE, "height": CANARY_SIZE, "guidance_scale": GUIDANCE})


def canary_request(facts: EngineFacts) -> Request:
    return {
        "prompt": "a canary",
        "model": facts.served_model_name,
        "size": f"{CANARY_SIZE}x{CANARY_SIZE}",
        "response_format": "b64_json",
        "nvext": {"num_inference_steps": 1, "guidance_scale": GUIDANCE, "seed": 0},
    }


IMAGE = diffusion.role(
    name="image",
    model_type="Images",
    to_engine=to_engine,
    to_dynamo=to_dynamo,
    canary=canary,
    canary_request=canary_request,
)
