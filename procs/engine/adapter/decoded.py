"""Images that a frontend has decoded: their pixels, read out of its memory when their request begins."""

import asyncio
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

    async def settle(self, payload: dict[str, Any]) -> None:
        """Put pictures (PIL) into the places of what ``decoded`` names: images come first. Raises RequestError."""
        images = payload.get("image_data", [])
        for index in payload.pop("decoded", ()):
            try:
                images[index] = await self._picture(decoded.unpack(images[index]))
            except RequestError as error:
                raise RequestError(error.code, f"image {index + 1}, decoded by the frontend: {error.message}") from None

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

    def numbers(self) -> dict[str, float]:
        return nixl.numbers()

    def close(self) -> None:
        nixl.close()


def picture(pixels: Any) -> Any:
    """RGB. Alpha is left out, as SGLang does with files that have it."""
    import numpy as np
    from PIL import Image

    colours = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., 0]
    return Image.fromarray(np.ascontiguousarray(colours)).convert("RGB")
