"""Calls to another worker of the cluster, through Dynamo's client: its chunks as they come, its failures as typed errors."""

import asyncio
import json
import logging
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from dynamo.llm.exceptions import InvalidArgument

from shared.errors import Code, RequestError

AHEAD = 64
"""Chunks that wait here for a client that reads slowly; past them the worker's own merging sets in."""
UNTYPED = re.compile(r"(\w+): (.*)", re.DOTALL)
"""How Dynamo 1.6.1's client gives on any error but InvalidArgument: its kind as text."""

Send = Callable[[Any, Any], Awaitable[AsyncIterator[Any]]]
"""A request and the context of the one that it belongs to -> the worker's answer."""


def failure(error: BaseException, name: str) -> RequestError:
    """The typed error for what a call raised.

    Measured with Dynamo 1.6.1: a worker that shuts down, can't be reached, or was killed is "Unavailable: ...".
    """
    if isinstance(error, InvalidArgument):
        return RequestError(Code.INVALID, str(error))
    found = UNTYPED.fullmatch(str(error))
    kind, words = found.groups() if found else ("", str(error) or type(error).__name__)
    if kind == "InvalidRequest":
        try:
            said = json.loads(words)
            if 400 <= said["code"] < 500:
                return RequestError(Code.INVALID, str(said["message"]))
        except (ValueError, KeyError, TypeError):
            pass
        return RequestError(Code.INTERNAL, f"{name}: {words}")
    if kind == "Internal":
        return RequestError(Code.INTERNAL, f"{name}: {words}")
    return RequestError(Code.PEER_DEAD, f"{name}: {words}")


class Call:
    """One request to another worker. Like an engine's Stream it can be aborted and failed from outside."""

    def __init__(self, name: str, send: Send, body: Any, context: Any) -> None:
        self._name = name
        self._chunks: deque[Any] = deque()
        self.failure: RequestError | None = None
        """How it ended; None for the normal end."""
        self._news, self._room = asyncio.Event(), asyncio.Event()
        self._ignored = False
        self.ended = False
        self.on_fail: Callable[[RequestError], None] = lambda error: None
        """Called when it fails of itself."""
        # Its own cancellation, below the same trace: Dynamo tells a worker that its answer was dropped only when it answers.
        self._context = context.detached(context.id())
        self._reader = asyncio.get_running_loop().create_task(self._read(send, body))

    async def _read(self, send: Send, body: Any) -> None:
        try:
            answer = await send(body, self._context)
            async for item in answer:
                self._room.clear()
                if not self._ignored:
                    self._chunks.append(item.data() if hasattr(item, "data") else item)
                    self._news.set()
                if len(self._chunks) >= AHEAD:
                    await self._room.wait()
        except Exception as error:  # of whatever type: Dynamo has no others
            if not self.ended:
                found = failure(error, self._name)
                logging.warning("%s", found)
                self._end(found)
                self.on_fail(found)
        else:
            self._end(None)

    def _end(self, error: RequestError | None) -> None:
        if not self.ended:
            self.ended, self.failure = True, error
            self._news.set()

    def abort(self) -> None:
        """Nobody wants the rest: the worker hears that its client has gone. What waits here is still given."""
        if not self.ended:
            self._end(None)
            self._leave()

    def fail(self, error: RequestError) -> None:
        """It ends with this error, at once."""
        if not self.ended:
            self._chunks.clear()
            self._end(error)
            self._leave()

    def _leave(self) -> None:
        self._context.stop_generating()
        self._reader.cancel()

    def ignore(self) -> None:
        """Of the rest only a failure matters."""
        self._ignored = True
        self._chunks.clear()
        self._room.set()

    def __aiter__(self) -> "Call":
        return self

    async def __anext__(self) -> Any:
        """The next chunk. Raises RequestError."""
        while not self._chunks:
            if self.failure is not None:
                raise self.failure
            if self.ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        self._room.set()
        return self._chunks.popleft()


class Callees:
    """The instances of one endpoint, one after the other."""

    def __init__(self, name: str, client: Any) -> None:
        self._name = name
        self._client = client

    def call(self, body: Any, context: Any) -> Call:
        """``context``: of the request that it is part of. Who hears of that one's cancellation has to abort the call."""
        return Call(self._name, self._send, body, context)

    def _send(self, body: Any, context: Any) -> Awaitable[AsyncIterator[Any]]:
        answer: Awaitable[AsyncIterator[Any]] = self._client.round_robin(body, context=context)
        return answer
