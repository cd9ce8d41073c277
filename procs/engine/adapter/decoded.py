"""Images that a frontend has decoded: their pixels, read out of its memory when their request begins."""

import asyncio
import io
import uuid
from typing import Any

from dynamo.nixl_connect import OperationKind

from procs.engine.adapter import nixl
from shared.config import MediaLimits
from shared.errors import RequestError
from shared.roles import decoded


class Decoded:
    """Makes the process's NIXL agent. Raises what that raises."""

    def __init__(self, limits: MediaLimits) -> None:
        self._seconds = limits.timeout
        self._agent = nixl.agent(limits.memory_bytes)

    async def settle(self, images: list[Any], which: list[int], *, files: bool = False) -> None:
        """Put pictures (PIL) into the places of those of ``images`` that are named. Raises RequestError.

        ``files``: as files that are as good as not encoded, for one who wants bytes.
        """
        for index in which:
            try:
                image = await self._picture(decoded.unpack(images[index]))
            except RequestError as error:
                raise RequestError(error.code, f"image {index + 1}, decoded by the frontend: {error.message}") from None
            images[index] = await asyncio.to_thread(plain, image) if files else image

    async def _picture(self, image: decoded.Decoded) -> Any:
        import torch

        where = image.nixl_descriptor
        metadata = {
            "descriptors": [{"device": "cpu", "ptr": where.addr, "size": where.size}],
            "nixl_metadata": image.nixl_metadata,
            "notification_key": str(uuid.uuid4()),
            "operation_kind": int(OperationKind.READ),
        }
        pixels = await self._agent.read(metadata, image.shape, torch.uint8, self._seconds)
        return await asyncio.to_thread(picture, pixels.numpy())

    def close(self) -> None:
        nixl.close()


def picture(pixels: Any) -> Any:
    """RGB. Alpha is left out, as SGLang does with files that have it."""
    import numpy as np
    from PIL import Image

    colours = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., 0]
    return Image.fromarray(np.ascontiguousarray(colours)).convert("RGB")


def plain(image: Any) -> bytes:
    """A PPM: its size and its pixels."""
    out = io.BytesIO()
    image.save(out, "PPM")
    return out.getvalue()
