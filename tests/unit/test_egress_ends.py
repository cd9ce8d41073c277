"""Egress by itself, where its thread and the loop meet: lost chunks, ends, threads that would stay, a reader that is slow."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from procs.agent.egress import Egress
from shared.errors import RequestError
from shared.frames import Output


class Stream:
    """As far as Egress reads from one; merges nothing."""

    def __init__(self) -> None:
        self.waiting: list[Output] = []
        self.ended = False
        self.on_ready: Callable[[], None] = lambda: None

    @property
    def has_news(self) -> bool:
        return bool(self.waiting)

    def take(self) -> Output | None:
        return self.waiting.pop(0) if self.waiting else None

    def abort(self) -> None: ...

    def put(self, *ids: int, end: bool = False) -> None:
        self.waiting.append(Output("r", 0, list(ids), {"type": "stop"} if end else None))
        self.ended = end
        self.on_ready()


class Channel:
    """A ResponseSender. ``bad``: chunks that can't be encoded."""

    def __init__(self, *bad: int) -> None:
        self.chunks: list[int] = []
        self.closed = self.waits = False
        self.bad = set(bad)
        self.reads = threading.Event()
        self.reads.set()

    def send(self, chunk: int, /) -> None:
        self.waits = True
        assert self.reads.wait(20)
        self.waits = False
        if chunk in self.bad:
            raise ValueError("no such type")
        self.chunks.append(chunk)

    def close(self) -> None:
        self.closed = True


def first_token(index: int, output: Output, now: float) -> int:
    return output.token_ids[0]


def threads() -> int:
    return sum(thread.name == "egress" for thread in threading.enumerate())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - another thread makes it true
            await asyncio.sleep(0.001)


class Scene:
    def __init__(self) -> None:
        self.egress = Egress()

    async def answer(self, channel: Channel, *streams: Stream) -> "asyncio.Task[None]":
        task = asyncio.create_task(self.egress.response(channel, streams, first_token).run(None))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        return task


def run(test: Callable[[Scene], Awaitable[None]]) -> None:
    """Every thread has ended afterwards."""
    before = threads()

    async def main() -> None:
        scene = Scene()
        try:
            await test(scene)
        finally:
            scene.egress.close()
        await until(lambda: threads() <= before)

    asyncio.run(main())


def test_a_last_chunk_that_is_lost_is_no_complete_answer() -> None:
    async def test(scene: Scene) -> None:
        channel, stream = Channel(2), Stream()
        task = await scene.answer(channel, stream)
        stream.put(1)
        await until(lambda: channel.chunks == [1])
        stream.put(2, end=True)
        with pytest.raises(RequestError, match="no such type"):
            await task
        assert not channel.closed

    run(test)


def test_nothing_follows_a_chunk_that_is_lost() -> None:
    async def test(scene: Scene) -> None:
        channel, one, other = Channel(2), Stream(), Stream()
        task = await scene.answer(channel, one, other)
        one.put(2)
        other.put(3)
        with pytest.raises(RequestError):
            await task
        assert channel.chunks == []

    run(test)


def test_a_response_that_is_cancelled_while_its_thread_is_stuck_leaves_no_thread() -> None:
    async def test(scene: Scene) -> None:
        channel, stream = Channel(), Stream()
        channel.reads.clear()
        task = await scene.answer(channel, stream)
        stream.put(1)
        await until(lambda: channel.waits)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stuck = scene.egress.pump
        await until(lambda: scene.egress.pump is not stuck)
        channel.reads.set()

    run(test)


class LateLock:
    """Lets its thread wait between the end of a response and the next look at the batch, as a busy machine would."""

    def __init__(self) -> None:
        self._lock, self._loop = threading.Lock(), threading.current_thread()
        self.late = False
        self.go = threading.Event()

    def __enter__(self) -> None:
        if self.late and threading.current_thread() is not self._loop:
            self.go.wait(20)
        self._lock.acquire()

    def __exit__(self, *_: Any) -> None:
        self._lock.release()


def test_giving_way_to_a_response_that_has_ended_leaves_no_thread() -> None:
    async def test(scene: Scene) -> None:
        pump = scene.egress.pump
        pump._lock = lock = LateLock()  # type: ignore[assignment]

        class Closing(Channel):
            def close(self) -> None:
                lock.late = True
                super().close()

        stream = Stream()
        task = await scene.answer(Closing(), stream)
        stream.put(1, end=True)
        await task
        await until(lambda: scene.egress.pump is not pump)
        lock.go.set()

    run(test)


def test_a_reader_that_takes_one_chunk_after_the_other_slowly_does_not_keep_the_others() -> None:
    """It is never stuck on a chunk: each one is taken before the next look."""

    async def test(scene: Scene) -> None:
        pump, slow, free = scene.egress.pump, Channel(), Channel()
        turns: list[None] = []

        def send(chunk: int, /) -> None:
            turns.append(None)
            threading.Event().wait(scene.egress.patience / 2)
            slow.chunks.append(chunk)

        slow.send = send  # type: ignore[method-assign]
        streams = [Stream() for _ in range(60)]
        task = await scene.answer(slow, *streams)
        for number, stream in enumerate(streams):
            stream.put(number, end=True)  # one batch of sixty chunks
        other = Stream()
        answered = await scene.answer(free, other)
        other.put(7, end=True)
        await answered
        assert scene.egress.pump is not pump and len(turns) < 60, "it waited for the whole batch"
        await task
        assert slow.chunks == list(range(60)) and slow.closed and free.closed

    run(test)
