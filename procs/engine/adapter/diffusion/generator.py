"""SGLang's DiffGenerator: how it is built, what it makes of one request, and what it says when it makes nothing."""

import contextlib
import os
import random
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from procs.engine.adapter import shm
from procs.engine.adapter.diffusion import files
from shared.blobs import BLOBS
from shared.errors import Code, RequestError

PORTS = range(20_000, 32_768)
"""Below the ephemeral range."""


class GenerationError(Exception):
    """SGLang failed at a request that it may have failed at anyway: its own words."""


@dataclass
class Made:
    """A file, of how many frames."""

    content: bytes
    frames: int


def build(arguments: dict[str, Any]) -> Any:
    """The generator, with its scheduler's processes. Blocks for the load. Raises RuntimeError when they don't come up."""
    from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator
    from sglang.multimodal_gen.runtime.server_args import ServerArgs

    class Generator(DiffGenerator):  # type: ignore[misc]
        """Keeps what a failed request failed of: SGLang logs it and returns None (0.5.23)."""

        failure = ""

        def _send_to_scheduler_and_wait_for_response(self, batch: Any) -> Any:
            for request in batch:
                request.report_progress = True
            answer = super()._send_to_scheduler_and_wait_for_response(batch)
            self.failure = str(getattr(answer, "error", None) or "")
            return answer

    _mark_shared_memory()
    known = getattr(ServerArgs, "__dataclass_fields__", {})
    arguments = dict(arguments)
    if "sleep_on_idle" in known:  # otherwise its loop has a core of its own, also with nothing to do
        arguments.setdefault("sleep_on_idle", True)
    for name in ("master_port", "scheduler_port"):
        if name in known:
            arguments.setdefault(name, free_port())
    return Generator.from_pretrained(**arguments)


def free_port() -> int:
    """Any. SGLang counts from a fixed one, and of two engines that start together on a host one finds it taken, and ends."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no free port from {PORTS.start} to {PORTS.stop - 1}")


def _mark_shared_memory() -> None:
    """What a killed engine leaves in /dev/shm carries the keeper's mark, in the letters that SGLang 0.5.23 allows there."""
    from sglang.multimodal_gen.runtime import ipc_array

    shm.mark()
    mark = os.environ.get(shm.VARIABLE, "")
    if mark and hasattr(ipc_array, "_REQUEST_PREFIX"):
        ipc_array._REQUEST_PREFIX = f"sgldiffusion-request-{mark.replace('-', '_')}_"


def makes_videos(generator: Any) -> bool:
    """False: pictures."""
    return not _task(generator).is_image_gen()


def takes_images(generator: Any) -> bool:
    """A request may start from a picture."""
    return bool(_task(generator).accepts_image_input())


def _task(generator: Any) -> Any:
    return generator.server_args.pipeline_config.task_type


def size_step(generator: Any) -> int:
    """Width and height that its model takes in any case are multiples of this, in pixels: its VAE's scale times its patch."""
    config = generator.server_args.pipeline_config
    vae = getattr(getattr(config, "vae_config", None), "arch_config", None)
    dit = getattr(getattr(config, "dit_config", None), "arch_config", None)
    scale = _number(vae, "scale_factor_spatial", "spatial_compression_ratio", "vae_scale_factor")
    return (scale or 8) * (_number(dit, "patch_size", "all_patch_size") or 2)


def _number(owner: Any, *names: str) -> int:
    """The first of these attributes that is a whole number above 0, or the last of a list of them."""
    for name in names:
        value = getattr(owner, name, None)
        value = value[-1] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int) and value > 0:
            return value
    return 0


def make(generator: Any, rid: str, payload: dict[str, Any], on_step: Callable[[], None]) -> Made:
    """One picture or video, encoded. Blocks for all of it; ``on_step`` is called while it is encoded.

    Raises RequestError(INVALID) for what the client has to change, GenerationError with SGLang's words for the rest.
    """
    params = {**payload["params"], "save_output": False, "request_id": rid}
    generator.failure = ""
    with _reference(payload.get(BLOBS)) as path:
        if path is not None:
            params["image_path"] = path
        try:
            found = generator.generate(sampling_params_kwargs=params)
        except (ValueError, TypeError) as error:  # it checks the arguments before anything else
            raise RequestError(Code.INVALID, str(error)) from error
    found = found[0] if isinstance(found, list) and found else found
    frames = getattr(found, "frames", None)
    if frames is None or not len(frames):
        raise _failure(generator, params)
    on_step()
    if "num_frames" not in params:
        return Made(files.png(frames[0]), 1)
    return Made(files.mp4(frames, params["fps"], on_step), len(frames))


def _failure(generator: Any, params: dict[str, Any]) -> Exception:
    """Why there is nothing. A size that is no multiple of its step is the likely reason, and the client's to change."""
    said = " ".join(generator.failure.replace(f"Error executing request {params['request_id']}: ", "").split())
    step, width, height = size_step(generator), params["width"], params["height"]
    if width % step or height % step:
        words = f"size {width}x{height}: width and height in multiples of {step} are what this model takes"
        return RequestError(Code.INVALID, f"{words} (SGLang: {said})" if said else words)
    return GenerationError(said or "SGLang has made nothing; its log says why")


@contextlib.contextmanager
def _reference(blobs: list[bytes] | None) -> Iterator[str | None]:
    """The picture to start from as a file of this life of the engine, removed afterwards."""
    if not blobs:
        yield None
        return
    with tempfile.NamedTemporaryFile(prefix="reference-", suffix=".png") as file:
        file.write(blobs[0])
        file.flush()
        yield file.name
