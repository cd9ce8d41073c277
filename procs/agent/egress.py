"""Chunks into Dynamo's response channels, from a thread beside the event loop: a client that does not read costs only itself.

Dynamo 1.6.1 gives a handler that declares ``response_sender`` the sending end of its response channel: one call a chunk, where
pulling chunks out of a generator costs a task and two waits for the GIL. The channel holds 128 chunks; ``send`` blocks past them,
which the event loop must not. While the thread sends, what comes is merged. A response that it is stuck on keeps it to its end,
and the others get a new one.
"""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from shared.engine_client import Stream
from shared.errors import Code, RequestError
from shared.frames import Output
from shared.roles.role import Chunk

PATIENCE_SECONDS = 0.05
"""A thread that sends one chunk for so long is stuck."""
SLOW_LOOKS = 2
"""It is stuck as well when it sends the same response in one look and in so many more, with any number of chunks between."""
LEAST_PATIENCE_SECONDS = 0.005
"""When one after the other gets stuck: a frontend that stands still holds many responses."""

Translate = Callable[[int, Output, float], Chunk | None]
"""Sample, output and the time (monotonic seconds) -> chunk. What it raises ends the response."""


class Sender(Protocol):
    """dynamo._core.ResponseSender."""

    def send(self, obj: Chunk, /) -> None:
        """Raises RuntimeError when the client has gone, ValueError for what can't be encoded."""

    def close(self) -> None:
        """The normal end."""


class Response:
    """One response on its way to its client."""

    def __init__(self, egress: "Egress", sender: Sender, streams: Sequence[Stream], translate: Translate) -> None:
        self._egress = egress
        self._streams = streams
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.left = len(streams)
        """Samples that have not ended."""
        self.sender = sender
        self.translate = translate
        self.pump: _Pump | None = None
        """Its own, once it got stuck."""
        self.over = False
        """No chunk of it is made any more."""
        self.gone = False
        """Nobody takes it any more: only the ends of its streams are waited for."""
        self.lost = False
        """A chunk was not taken, as its thread knows at once: nothing may follow it, least of all the normal end."""
        self.error: Exception | None = None

    async def run(self, opening: Chunk | None) -> None:
        """Send the opening and what the streams bring, to the end. Raises what a stream or ``translate`` raises."""
        if opening is not None:
            self.ready(_Opening(self, opening))
        for index, stream in enumerate(self._streams):
            stream.on_ready = _Source(self, index, stream).ready
            if stream.has_news:
                stream.on_ready()
        try:
            await self._done
        finally:
            self.over = True
            if self.pump is not None:
                self.pump.close()
        if self.error is not None:
            raise self.error

    def ready(self, source: "_Source | _Opening") -> None:
        """It waits for its turn."""
        pump = self.pump or self._egress.pump
        pump.waiting.append(source)
        if not pump.scheduled:
            # After this turn of the loop: of several steps that are read in it, a stream makes one chunk.
            pump.scheduled = True
            pump.loop.call_soon(pump.flush)

    def ended(self) -> None:
        """All of it is in the channel."""
        if not self._done.done():
            self._done.set_result(None)

    def broken(self, error: Exception) -> None:
        """A chunk was not taken."""
        if isinstance(error, RuntimeError):
            self.gone = True
            for stream in self._streams:
                stream.abort()
        elif not self.over:
            self.over = True
            self.error = RequestError(Code.INTERNAL, f"the answer can't be passed on: {error}")
            self.ended()


class _End:
    """In a batch, the end of a response."""


_END = _End()
_Batch = deque[tuple[Response, Chunk | _End]]


class _Opening:
    """A chunk that no stream has brought."""

    def __init__(self, response: Response, chunk: Chunk) -> None:
        self.response = response
        self._chunk = chunk

    def collect(self, now: float, batch: _Batch) -> None:
        batch.append((self.response, self._chunk))


class _Source:
    """One sample of a response."""

    __slots__ = ("_index", "_stream", "ready", "response")

    def __init__(self, response: Response, index: int, stream: Stream) -> None:
        self.response = response
        self._index = index
        self._stream = stream
        self.ready = partial(response.ready, self)
        """Called when its stream has something where it had nothing."""

    def collect(self, now: float, batch: _Batch) -> None:
        """What has come since the last time, as one chunk."""
        response = self.response
        if response.over:
            return
        try:
            output = self._stream.take()
            if output is None:
                return
            chunk = response.translate(self._index, output, now)
        except Exception as error:  # the handler's to name
            response.over = True
            response.error = error
            batch.append((response, _END))
            return
        if chunk is not None and not response.gone:
            batch.append((response, chunk))
        if output.finish is not None:
            response.left -= 1
            if not response.left:
                batch.append((response, _END))
        elif self._stream.ended:
            self.ready()  # for its failure


class _Pump:
    """A thread that sends one batch after the other, and on the loop what waits for it."""

    def __init__(self, egress: "Egress") -> None:
        self._egress = egress
        self.loop = asyncio.get_running_loop()
        self.waiting: list[_Source | _Opening] = []
        self.scheduled = self._busy = self._again = False
        self._watching = False
        self._seen: Response | None = None
        self._hits = 0
        """In so many looks in a row it was sending the same response."""
        self._queue: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        """Of the three that follow."""
        self._batch: _Batch = deque()
        self._sending: Response | None = None
        self._sent = 0
        threading.Thread(target=self._run, name="egress", daemon=True).start()

    def flush(self) -> None:
        """Give the thread what waits, unless it has something."""
        self.scheduled = False
        self._again = True  # before the look at _busy, as the thread looks after it has changed that
        if self._busy:
            return
        self._again = False
        waiting, self.waiting = self.waiting, []
        batch: _Batch = deque()
        now = self._egress.clock()
        for source in waiting:
            source.collect(now, batch)
        if batch:
            self._give(batch)

    def _give(self, batch: _Batch) -> None:
        self._busy = True
        self._queue.put(batch)
        if not self._watching and self._egress.pump is self:
            self._watching = True
            self.loop.call_later(self._egress.patience, self._look, self._sent)

    def _look(self, sent: int) -> None:
        """Is it stuck?"""
        egress = self._egress
        if not self._busy or egress.pump is not self:
            self._watching, self._seen, self._hits = False, None, 0
            return
        sending = self._sending
        self._hits = self._hits + 1 if sending is self._seen and sending is not None else 0
        self._seen = sending
        # Stuck on one chunk, or on one after the other of a client that reads too slowly.
        if (self._sent == sent or self._hits >= SLOW_LOOKS) and self._give_way():
            egress.patience = max(egress.patience / 4, LEAST_PATIENCE_SECONDS)
        else:
            egress.patience = min(egress.patience * 2, PATIENCE_SECONDS)
            self.loop.call_later(egress.patience, self._look, self._sent)

    def _give_way(self) -> bool:
        """Keep the response that it is stuck on, and leave the others to a new thread."""
        with self._lock:
            stuck = self._sending
            if stuck is None:
                return False
            stuck.pump = self
            other = self._egress.pump = _Pump(self._egress)
            others = deque(item for item in self._batch if item[0] is not stuck)
            self._batch = deque(item for item in self._batch if item[0] is stuck)
        other.waiting = [source for source in self.waiting if source.response is not stuck]
        self.waiting = [source for source in self.waiting if source.response is stuck]
        other._again = True
        other._give(others)
        if stuck.over:  # its run() may have looked already whether it has a pump to close
            self.close()
        return True

    def close(self) -> None:
        """After what it has."""
        self._queue.put(None)

    def _run(self) -> None:
        tell = self.loop.call_soon_threadsafe
        while (batch := self._queue.get()) is not None:
            self._batch = batch
            while True:
                with self._lock:
                    self._sent += 1
                    if not self._batch:
                        self._sending = None
                        break
                    response, chunk = self._batch.popleft()
                    self._sending = response
                try:
                    if chunk is not _END:
                        if not response.lost:
                            response.sender.send(chunk)
                        continue
                    if response.error is None and not response.lost:
                        response.sender.close()
                    tell(response.ended)
                except Exception as error:  # whatever it is, it is this response's
                    response.lost = True
                    tell(response.broken, error)
            self._busy = False
            if self._again:
                tell(self.flush)


class Egress:
    """All responses of an agent."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.patience = PATIENCE_SECONDS
        self.pump = _Pump(self)

    def response(self, sender: Sender, streams: Sequence[Stream], translate: Translate) -> Response:
        """A response of these streams, none of which has been read from."""
        return Response(self, sender, streams, translate)

    def close(self) -> None:
        self.pump.close()
