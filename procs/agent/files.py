"""Requests whose answer is files: stored, or in the answer as base64. A picture to start from is fetched like other media."""

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from typing import Any

from dynamo.llm.exceptions import HttpError

from procs.agent.handler import Handler
from procs.agent.output_store import OutputStore, StoreError
from shared.blobs import take
from shared.engine_client import EngineClient, interleaved
from shared.frames import Output
from shared.roles import diffusion, media
from shared.roles.role import Asked, Chunk, Role

STORE_FAILED = 502
"""HTTP status of a file that can't be stored: neither the request nor the engine is at fault."""
IN_PASSING = 1 << 20
"""Bytes that become base64 on the event loop; it takes a millisecond."""


class FileHandler(Handler):
    """Of an image or a video worker."""

    def __init__(self, client: EngineClient, role: Role, refuse: Callable[[], str], store: OutputStore) -> None:
        super().__init__(client, role, refuse)
        self._store = store

    @property
    def endpoint(self) -> Callable[..., AsyncIterator[Chunk]]:
        """One or a few large chunks: pulled, as each waits for its file."""
        return self.deliver

    async def deliver(self, request: Any, context: Any) -> AsyncIterator[Chunk]:
        """Dynamo 1.6.1 calls this for each request. A file that nobody gets to know of is removed."""
        stored: list[str] = []
        try:
            async with self._answering(self._with_reference(request), context) as answer:
                async for index, output in interleaved(answer.streams):
                    if not answer.nobody_listens:
                        await self._place(output, index, answer.asked, stored)
                    if answer.nobody_listens:
                        continue
                    chunk = answer.chunk(index, output, self.latency.clock())
                    if chunk is not None:
                        yield chunk
                if answer.nobody_listens:
                    self._store.discard(stored)
        except BaseException:
            self._store.discard(stored)
            raise

    def _with_reference(self, request: Any) -> Any:
        """Its reference is fetched as any other medium is; nothing else of that name is."""
        welcome = self._client.welcome
        if not isinstance(request, dict) or welcome is None:
            return request
        found = {name: value for name, value in request.items() if name != media.DATA}
        wanted = diffusion.wanted(request, welcome.facts)
        return found if wanted is None else {**found, media.DATA: wanted}

    async def _place(self, output: Output, index: int, asked: Asked, stored: list[str]) -> None:
        """The output's blob becomes a URL or base64. Raises HttpError where it can't be stored."""
        meta, blobs = take(output.meta)
        if not blobs:
            return
        path, content = asked.kept[diffusion.PATHS][index], bytes(blobs[0])
        if path is not None:
            try:
                place = {"url": await self._store.put(path, content)}
            except StoreError as error:
                raise HttpError(STORE_FAILED, str(error)) from None
            stored.append(path)
        elif len(content) <= IN_PASSING:
            place = {"b64_json": _text(content)}
        else:
            place = {"b64_json": await asyncio.to_thread(_text, content)}
        output.meta = {**(meta or {}), diffusion.PLACE: place}

    def close(self) -> None:
        super().close()
        self._store.close()


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
