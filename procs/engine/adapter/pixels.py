"""Images that SGLang decodes at a time, bounded: 64 megapixels can come in 200 kB, and take 450 MB until they are resized.

SGLang 0.5.23 holds the decoded images of every request that it tokenises.
"""

import asyncio
import io
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "PPM")
"""Those that an agent lets through, and what becomes of an image that a frontend has decoded."""
AT_A_TIME = 256_000_000
"""Pixels, of seven bytes each at the peak. A request that has more is alone."""


class Turns:
    """Requests take turns when their images are too many together; first come, first served."""

    def __init__(self, most: int = AT_A_TIME) -> None:
        self._most = most
        self._taken = 0
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def share(self, wanted: int) -> AsyncIterator[None]:
        size = min(wanted, self._most)
        async with self._turn:
            while self._taken + size > self._most:
                self._freed.clear()
                await self._freed.wait()
            self._taken += size
        try:
            yield
        finally:
            self._taken -= size
            self._freed.set()


def bound(manager: Any) -> None:
    """Let the processor's images take turns from now on. Doing it twice does no harm."""
    processor = manager.mm_processor
    process = getattr(processor, "process_mm_data_async", None)
    if process is None or hasattr(process, "turns"):
        return
    turns = Turns()

    async def in_turn(*arguments: Any, image_data: Any = None, **more: Any) -> Any:
        # In a thread: a header that an agent lets through can still take PIL 0.1 s.
        async with turns.share(await asyncio.to_thread(total, image_data or ())):
            return await process(*arguments, image_data=image_data, **more)

    in_turn.turns = turns  # type: ignore[attr-defined]
    processor.process_mm_data_async = in_turn


def total(images: Iterable[Any]) -> int:
    return sum(map(count, images))


def count(image: Any) -> int:
    """Pixels of an image, of a file by its header; none for what isn't one, which SGLang will say."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the agent's is the bound (--media-max-megapixels), also for SGLang's decoding
    if isinstance(image, Image.Image):
        return image.width * image.height
    if not isinstance(image, bytes):
        return 0
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
            return opened.width * opened.height
    except Exception:  # as many ways as decoders
        return 0
