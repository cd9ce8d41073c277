"""Media of a request, fetched and looked at before anything of it reaches the engine, within the operator's bounds.

SGLang 0.5.23 would open files and fetch from anywhere, as dynamo.sglang 1.6.1 lets it do with images and audio. The engine of
this node gets bytes only.
"""

import asyncio
import reprlib
from functools import partial
from typing import Any

from procs.agent.images import look
from procs.agent.media_source import Sources
from shared.config import MediaLimits
from shared.errors import Code, RequestError
from shared.roles import decoded
from shared.roles.media import KINDS
from shared.roles.role import Media

LARGE_IMAGES = 4
"""All images of a request may have the pixels of so many of the largest size. The engine has them decoded all at once."""


class Intake:
    """Fetches media, within bounds that hold for a request and for all of this agent's requests together."""

    def __init__(self, limits: MediaLimits) -> None:
        self._limits = limits
        self._sources = Sources(limits)
        self.held = 0
        """Bytes of media that were fetched, or are being, and whose requests the engine has not answered."""

    async def gather(self, data: Any) -> Media:
        """Everything in a request's ``multi_modal_data``, which loses its references. ``release`` it when the engine has it.

        Raises RequestError: INVALID for what the client has to change, OVERLOADED past the bound of all requests together.
        """
        items = _items(data)
        self._count(items)
        media = Media([kind for kind, _, _ in items], [])
        tasks = [asyncio.ensure_future(self._one(*item, media)) for item in items]
        try:
            found = await asyncio.gather(*tasks)
            pixels, most = sum(each for _, each in found), LARGE_IMAGES * self._limits.max_pixels
            if pixels > most:
                raise RequestError(Code.INVALID, f"images of {pixels} pixels together, {most} at most (--media-max-megapixels)")
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.release(media)
            raise
        media.blobs += [content for content, _ in found]
        media.decoded += [index for index, (_, _, item) in enumerate(items) if decoded.named(item)]
        for name in KINDS:  # a data: URL is as large as what it holds
            if data.get(name):
                data[name] = [None] * len(data[name])
        return media

    def release(self, media: Media) -> None:
        """Its bytes are the engine's now, or nobody's. Doing it twice does no harm."""
        self.held -= media.held
        media.held = 0
        media.blobs.clear()

    def _count(self, items: list[tuple[str, int, Any]]) -> None:
        if len(items) > self._limits.max_items:
            raise RequestError(Code.INVALID, f"{len(items)} images, videos and audio clips: {self._limits.max_items} at most")
        for kind, most in self._limits.per_kind.items():
            found = sum(1 for each, _, _ in items if each == kind)
            if found > most:
                raise RequestError(Code.INVALID, f"{found} items of type {kind}: {most} at most")

    def _hold(self, media: Media, size: int) -> None:
        most = self._limits.memory_bytes
        if media.held + size > most:
            raise RequestError(Code.INVALID, f"media of more than {most >> 20} MB in one request (--media-memory-mb)")
        if self.held + size > most:
            raise RequestError(Code.OVERLOADED, f"media of {self.held >> 20} MB wait for the engine; {most >> 20} MB at most")
        self.held += size
        media.held += size

    async def _one(self, kind: str, number: int, item: Any, media: Media) -> tuple[bytes, int]:
        """An item's bytes, and its pixels where it is an image."""
        url = item.get("Url") if isinstance(item, dict) else item
        try:
            if self._limits.frontend_decoding and decoded.named(item):
                return self._decoded(kind, item, media)
            if not isinstance(url, str):
                raise RequestError(Code.INVALID, f"expected a URL, got {_short(item)}")
            content = await self._sources.read(url, partial(self._hold, media))
            pixels = await asyncio.to_thread(look, content, self._limits.max_pixels) if kind == "image" else 0
        except RequestError as error:
            raise RequestError(error.code, f"{kind} {number}: {_line(error.message)}") from None
        return content, pixels

    def _decoded(self, kind: str, item: Any, media: Media) -> tuple[bytes, int]:
        """Its pixels stay where they are until the engine reads them; it is then that they take memory."""
        image = decoded.check(item, kind, self._limits.max_pixels)
        self._hold(media, image.nixl_descriptor.size)
        return decoded.pack(image), image.shape[0] * image.shape[1]


def _items(data: Any) -> list[tuple[str, int, Any]]:
    """Kind, number and reference of each in the order in which the engine is to take them: by kind, then as in the messages."""
    if not isinstance(data, dict):
        raise RequestError(Code.INVALID, "multi_modal_data: expected an object")
    found = []
    for name, kind in KINDS.items():
        given = data.get(name) or []
        if not isinstance(given, list):
            raise RequestError(Code.INVALID, f"multi_modal_data.{name}: expected a list")
        found += [(kind, number, item) for number, item in enumerate(given, 1)]
    if unknown := [name for name, given in data.items() if given and name not in KINDS]:
        raise RequestError(Code.INVALID, f"multi_modal_data: no such kind: {_short(unknown[0])}")
    return found


def _line(text: str) -> str:
    """As one line: a URL's own line breaks would be lines of a log."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _short(value: Any) -> str:
    text = f"an object with {', '.join(str(name)[:20] for name in list(value)[:5])}" if isinstance(value, dict) else _REPR(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


_REPR = reprlib.Repr().repr
"""Of anything, in little time."""
