"""Embeddings of media that were encoded before, by content, in Dynamo's own cache; what is being encoded is not encoded twice.

dynamo.sglang 1.6.1 keys by URL, whose content may change, and keeps views of whole batches. Here each entry is its own memory.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from blake3 import blake3


@dataclass(frozen=True)
class Encoded:
    """One image or video: a row a token on the CPU, and where they are in it (time, height, width in patches)."""

    embeddings: Any
    grid: list[int]
    second_per_grid_ts: float | None = None
    video_timestamps: list[float] | None = None

    @property
    def rows(self) -> int:
        return int(self.embeddings.shape[0])


class EncodedCache:
    """``capacity`` in bytes; 0: nothing is kept, and each is encoded anew."""

    def __init__(self, capacity: int, encode: Callable[[str, bytes], Awaitable[Encoded]]) -> None:
        from dynamo.common.memory.multimodal_embedding_cache_manager import MultimodalEmbeddingCacheManager

        self._encode = encode
        self._kept = MultimodalEmbeddingCacheManager(capacity) if capacity else None
        self._running: dict[str, asyncio.Future[Encoded]] = {}

    async def get(self, kind: str, content: bytes) -> Encoded:
        """Raises what encoding raises."""
        if self._kept is None:
            return await self._encode(kind, content)
        key = f"{kind}:{blake3(content).hexdigest()}"
        if key in self._running:
            return await asyncio.shield(self._running[key])
        if (found := self._kept.get(key)) is not None:
            grid = found.image_grid_thw or found.video_grid_thw
            return Encoded(found.tensor, grid, found.second_per_grid_ts, found.video_timestamps)
        # Not of the request that came first: others wait for it when that one is cancelled.
        running = self._running[key] = asyncio.ensure_future(self._make(key, kind, content))

        def ended(made: asyncio.Future[Encoded]) -> None:
            del self._running[key]
            made.exception()  # said to those who wait, if any are left

        running.add_done_callback(ended)
        return await asyncio.shield(running)

    async def _make(self, key: str, kind: str, content: bytes) -> Encoded:
        from dynamo.common.memory.multimodal_embedding_cache_manager import CachedEmbedding

        made = await self._encode(kind, content)
        assert self._kept is not None
        grids = {f"{kind}_grid_thw": made.grid}
        times = {"second_per_grid_ts": made.second_per_grid_ts, "video_timestamps": made.video_timestamps}
        self._kept.set(key, CachedEmbedding(made.embeddings.contiguous(), **grids, **times))
        return made

    def numbers(self) -> dict[str, float]:
        """Of Dynamo's cache, for the Beat; nothing without one."""
        if self._kept is None:
            return {}
        stats = self._kept.stats
        return {f"embedding_cache_{name}": float(value) for name, value in stats.items()}
