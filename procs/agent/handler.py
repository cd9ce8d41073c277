"""One request through an agent: Dynamo's dict in, chunks out, cancellation and failures on the way."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from procs.agent.failures import abort_exception, exception
from shared.engine_client import EngineClient, Stream
from shared.errors import Code, RequestError
from shared.frames import Output
from shared.roles.role import Role


class Handler:
    """Serves the ``generate`` endpoint. ``refuse`` says why no request is taken now, or is empty."""

    def __init__(self, client: EngineClient, role: Role, refuse: Callable[[], str]) -> None:
        self._client = client
        self._role = role
        self._refuse = refuse
        self.running = 0
        self.total = 0
        self.cut = asyncio.Event()
        """Set at the drain deadline: what still runs ends with the migratable error."""
        self.first_token_source: Any | None = None
        self.on_change: Callable[[], None] = lambda: None

    async def generate(self, request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        """Dynamo 1.6.1 calls this for each request; the second parameter must be called ``context``."""
        self.running += 1
        self.total += 1
        streams: list[Stream] = []
        started = False
        try:
            streams = self._submit(request, context)
            async for chunk in self._chunks(streams, request, context):
                if not started:
                    started = True
                    context.notify_first_token()
                yield chunk
        except RequestError as error:
            raise exception(error, started=started) from error
        finally:
            for stream in streams:
                stream.abort()
            self.running -= 1
            self.on_change()

    def _submit(self, request: dict[str, Any], context: Any) -> list[Stream]:
        logging.debug("New Request ID: %s", context.id())
        if reason := self._refuse():
            raise RequestError(Code.DRAINING, reason)
        if self._client.welcome is None:
            raise RequestError(Code.ENGINE_DEAD, "no engine is up")
        if self.first_token_source is not None:
            self.first_token_source.bind(context, (request.get("routing") or {}).get("dp_rank"))
        payloads = self._role.to_engine(request, self._client.welcome.facts)
        streams = [self._client.submit(payload) for payload in payloads]
        for stream in streams:
            logging.info("Submitted SGLang Request ID: %s, Context: %s", stream.rid, context.id())
        return streams

    async def _chunks(self, streams: list[Stream], request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        """Chunks of all samples until each has ended, the client has gone, or the drain deadline has come."""
        cancelled = False

        def cancel(_: Any) -> None:
            nonlocal cancelled
            cancelled = True
            logging.info("Aborted Request ID: %s", context.id())
            for stream in streams:
                stream.abort()

        def cut(_: Any) -> None:
            for stream in streams:
                if not stream.ended:
                    stream.abort()
                    stream.fail(RequestError(Code.ENGINE_DEAD, "the node is stopping"))

        killed = asyncio.ensure_future(context.async_killed_or_stopped())
        killed.add_done_callback(lambda done: None if done.cancelled() else cancel(done))
        cutting = asyncio.ensure_future(self.cut.wait())
        cutting.add_done_callback(lambda done: None if done.cancelled() else cut(done))
        try:
            outputs = _single(streams[0]) if len(streams) == 1 else _several(streams)
            async for index, output in outputs:
                if cancelled:
                    continue
                if output.finish is not None and output.finish.get("type") == "abort":
                    raise abort_exception(output.finish)
                yield self._role.to_dynamo(output, index, request)
        finally:
            killed.cancel()
            cutting.cancel()

    async def clear_kv_blocks(self, request: Any = None, context: Any = None) -> AsyncIterator[dict[str, Any]]:
        """Dynamo's ``clear_kv_blocks`` endpoint: flush SGLang's cache when nothing runs."""
        try:
            await self._client.control("flush_cache", {})
        except RequestError as error:
            yield {"status": "error", "message": error.message}
        else:
            yield {"status": "success", "message": "KV cache cleared"}


async def _single(stream: Stream) -> AsyncIterator[tuple[int, Output]]:
    async for output in stream:
        yield 0, output


async def _several(streams: list[Stream]) -> AsyncIterator[tuple[int, Output]]:
    """Outputs of several samples in the order in which they come."""
    queue: asyncio.Queue[tuple[int, Output] | Exception | None] = asyncio.Queue()

    async def pump(index: int, stream: Stream) -> None:
        try:
            async for output in stream:
                queue.put_nowait((index, output))
            queue.put_nowait(None)
        except RequestError as error:
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(pump(i, stream)) for i, stream in enumerate(streams)]
    left = len(streams)
    try:
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
