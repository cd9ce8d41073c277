"""Role ``video``: videos of texts (/v1/videos; dynamo.sglang 1.6.1, VideoGenerationWorkerHandler)."""

import time
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from shared.errors import Code, RequestError
from shared.frames import EngineFacts, Output
from shared.roles import diffusion
from shared.roles.diffusion import Scale, Seed
from shared.roles.request import typed
from shared.roles.role import Asked, Chunk, Payload, Request

MAX_STEPS = 200
MAX_FPS = 120
MAX_SECONDS = 600
MAX_FRAMES = 4096
FRAMES_OF_PIXELS = 16
"""All frames together may have so many times the pixels of --media-max-megapixels: they are in memory at once, 3 bytes each."""
CANARY_SIZE = 256
CANARY_FRAMES = 5

Steps = Annotated[int, Meta(ge=1, le=MAX_STEPS)]


class VideoNvExt(msgspec.Struct):
    """NVIDIA's part of a request. ``num_frames`` goes before ``fps`` x ``seconds``."""

    fps: Annotated[int, Meta(ge=1, le=MAX_FPS)] | None = 24
    num_frames: Annotated[int, Meta(ge=1, le=MAX_FRAMES)] | None = None
    negative_prompt: str | None = None
    num_inference_steps: Steps | None = 50
    guidance_scale: Scale = 5.0
    seed: Seed | None = None


class VideoRequest(msgspec.Struct):
    """OpenAI's, as Dynamo passes it on. ``size``: WxH."""

    prompt: str
    model: str
    seconds: Annotated[int, Meta(ge=1, le=MAX_SECONDS)] | None = 4
    size: str | None = "832x480"
    response_format: Literal["url", "b64_json"] | None = "url"
    output_format: Literal["mp4"] | None = None
    input_reference: str | None = None
    nvext: VideoNvExt | None = None


def to_engine(asked: Asked) -> list[Payload]:
    """Raises RequestError(INVALID)."""
    read = typed(asked.request, VideoRequest)
    more = read.nvext or VideoNvExt()
    fps, steps = _required("nvext.fps", more.fps), _required("nvext.num_inference_steps", more.num_inference_steps)
    if read.size is None:
        raise RequestError(Code.INVALID, "size is required")
    width, height = diffusion.size(read.size, asked.facts)
    frames = fps * _required("seconds", read.seconds) if more.num_frames is None else more.num_frames
    _bounded(frames, width * height, asked.facts)
    params = {
        "prompt": read.prompt,
        "negative_prompt": more.negative_prompt,
        "width": width,
        "height": height,
        "num_frames": frames,
        "fps": fps,
        "num_inference_steps": steps,
        "guidance_scale": more.guidance_scale,
        "seed": diffusion.seed(more.seed),
    }
    given = diffusion.reference(asked, read.input_reference)
    path = f"{diffusion.safe(asked.context_id)}.mp4" if read.response_format == "url" else None
    asked.kept.update({diffusion.PATHS: [path], "model": read.model, "began": time.monotonic()})
    return [{"call": diffusion.ENGINE, "params": params, **given}]


def _required(name: str, value: int | None) -> int:
    if value is None:
        raise RequestError(Code.INVALID, f"{name} is required")
    return value


def _bounded(frames: int, pixels: int, facts: EngineFacts) -> None:
    if frames > MAX_FRAMES:
        raise RequestError(Code.INVALID, f"fps x seconds: {frames} frames, {MAX_FRAMES} at most")
    most = facts.max_pixels
    if most is not None and frames * pixels > FRAMES_OF_PIXELS * most:
        words = f"{frames} frames of {pixels} pixels, {FRAMES_OF_PIXELS * most} pixels in all at most"
        raise RequestError(Code.INVALID, f"num_frames and size: {words}")


def to_dynamo(output: Output, index: int, asked: Asked) -> Chunk | None:
    """The whole answer: there is one output."""
    place = (output.meta or {}).get(diffusion.PLACE)
    if place is None:
        return None
    return {
        "id": f"video-{asked.context_id}",
        "object": "video",
        "model": asked.kept["model"],
        "status": "completed",
        "progress": 100,
        "created": int(time.time()),
        "data": [{"output_format": "mp4", "url": None, "b64_json": None, **place}],
        "error": None,
        "inference_time_s": time.monotonic() - asked.kept["began"],
    }


def _canary_params() -> dict[str, Any]:
    return {"num_frames": CANARY_FRAMES, "fps": 8, "guidance_scale": 5.0}


def canary(facts: EngineFacts) -> Payload:
    return diffusion.canary({"width": CANARY_SIZE, "height": CANARY_SIZE, **_canary_params()})


def canary_request(facts: EngineFacts) -> Request:
    return {
        "prompt": "a canary",
        "model": facts.served_model_name,
        "seconds": 1,
        "size": f"{CANARY_SIZE}x{CANARY_SIZE}",
        "response_format": "b64_json",
        "nvext": {"num_inference_steps": 1, "seed": 0, **_canary_params()},
    }


VIDEO = diffusion.role(
    name="video",
    model_type="Videos",
    to_engine=to_engine,
    to_dynamo=to_dynamo,
    canary=canary,
    canary_request=canary_request,
)
