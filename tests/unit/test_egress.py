"""Chunks pushed into response channels: order, merging, ends, a client that goes and one that does not read."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from dynamo.llm.exceptions import EngineShutdown

from procs.agent.handler import Handler
from shared.errors import Code
from shared.frames import Death
from shared.roles import ROLES
from tests.unit.test_agent_handler import REQUEST, Scene
from tests.unit.test_agent_handler import run as scene_run
from tests.unit.test_service import INCARNATION


class Channel:
    """Stands for dynamo._core.ResponseSender; ``hold``: the client does not read."""

    def __init__(self) -> None:
        self.chunks: list[Any] = []
        self.closed = False
        self.reads = threading.Event()
        self.reads.set()
        self.waits = False
        self.error: Exception | None = None

    def send(self, chunk: Any, /) -> None:
        self.waits = True
        assert self.reads.wait(10)
        self.waits = False
        if self.error is not None:
            raise self.error
        assert not self.closed
        self.chunks.append(chunk)

    def close(self) -> None:
        self.closed = True

    @property
    def tokens(self) -> list[list[int]]:
        return [chunk["token_ids"] for chunk in self.chunks]


def run(directory: Path, test: Callable[[Scene], Awaitable[None]]) -> None:
    async def tested(scene: Scene) -> None:
        try:
            await test(scene)
        finally:
            scene.handler.close()

    scene_run(directory, tested)


def push(scene: Scene, channel: Channel, **more: Any) -> "asyncio.Task[list[Any]]":
    async def collect() -> list[Any]:
        return [chunk async for chunk in scene.handler.generate({**REQUEST, **more}, scene.context, response_sender=channel)]

    return asyncio.create_task(collect())


async def started(scene: Scene, count: int, channel: Channel) -> tuple["asyncio.Task[list[Any]]", str]:
    task = push(scene, channel)
    return task, (await scene.submitted(count))[-1]


def test_chunks_are_pushed_in_order_and_the_channel_is_closed_behind_the_last(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        channel = Channel()
        task, rid = await started(scene, 1, channel)
        for number in range(200):
            scene.tokens(rid, number, finish={"type": "length"} if number == 199 else None)
            await asyncio.sleep(0)
        assert await task == [] and channel.closed
        assert [token for tokens in channel.tokens for token in tokens] == list(range(200))
        assert channel.chunks[-1]["finish_reason"] == "length" and scene.context.first == 1

    run(tmp_path, test)


def test_what_comes_while_the_thread_sends_is_one_chunk(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        channel = Channel()
        channel.reads.clear()
        task, rid = await started(scene, 1, channel)
        scene.tokens(rid, 0)
        await scene.bench.until(lambda: channel.waits)
        for number in range(1, 10):
            scene.tokens(rid, number, finish={"type": "length"} if number == 9 else None)
        await scene.bench.until(lambda: all(stream.ended for stream in scene.handler._streams))
        channel.reads.set()
        await task
        assert channel.tokens == [[0], list(range(1, 10))]

    run(tmp_path, test)


def test_a_client_that_does_not_read_keeps_one_thread_and_nobody_waits_for_it(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        stuck, free = [Channel() for _ in range(3)], Channel()
        tasks, rids = [], []
        for count, channel in enumerate([*stuck, free], 1):
            task, rid = await started(scene, count, channel)
            tasks.append(task)
            rids.append(rid)
        for channel in stuck:
            channel.reads.clear()
        for round_ in range(20):
            for rid in rids:
                scene.tokens(rid, round_)
            await scene.bench.until(lambda: sum(map(len, free.tokens)) == round_ + 1)  # noqa: B023 - awaited in its round
        assert [channel.tokens for channel in stuck] == [[]] * 3
        for rid in rids:
            scene.tokens(rid, 20, finish={"type": "length"})
        await tasks[-1]
        assert free.closed and not any(task.done() for task in tasks[:3])
        for channel in stuck:
            channel.reads.set()
        await asyncio.gather(*tasks)
        for channel in stuck:
            assert channel.closed and [token for tokens in channel.tokens for token in tokens] == list(range(21))

    run(tmp_path, test)


def test_a_failure_comes_behind_what_was_sent_and_leaves_the_channel_open(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        channel = Channel()
        channel.reads.clear()
        task, rid = await started(scene, 1, channel)
        scene.tokens(rid, 1)
        await scene.bench.until(lambda: channel.waits)
        scene.tokens(rid, 2)
        await scene.bench.until(lambda: any(stream.has_news for stream in scene.handler._streams))
        scene.client.hear_death(Death(INCARNATION, "scheduler", 1, "killed", 0.0))
        channel.reads.set()
        with pytest.raises(EngineShutdown):
            await task
        assert channel.tokens == [[1], [2]] and not channel.closed

    run(tmp_path, test)


def test_a_client_that_has_gone_aborts_and_the_end_is_waited_for(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        channel = Channel()
        channel.error = RuntimeError("response stream is closed")
        task, rid = await started(scene, 1, channel)
        scene.tokens(rid, 1)
        await scene.bench.until(lambda: scene.bench.backend.aborted == [rid])
        assert not task.done()
        scene.context.killed.set_result(True)
        scene.tokens(rid, finish={"type": "abort"})
        await task

    run(tmp_path, test)


def test_what_can_t_be_encoded_ends_its_own_request(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        bad, good = Channel(), Channel()
        bad.error = ValueError("no such type")
        task, rid = await started(scene, 1, bad)
        other, other_rid = await started(scene, 2, good)
        scene.tokens(rid, 1)
        scene.tokens(other_rid, 1, finish={"type": "stop"})
        with pytest.raises(RuntimeError, match="can't be passed on: no such type"):
            await task
        await other
        assert good.tokens == [[1]] and good.closed
        await scene.bench.until(lambda: scene.bench.backend.aborted == [rid])

    run(tmp_path, test)


def test_samples_share_a_channel(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        channel = Channel()
        task = push(scene, channel, sampling_options={"n": 3})
        rids = await scene.submitted(3)
        for number, rid in enumerate(rids):
            scene.tokens(rid, number)
        await scene.bench.until(lambda: len(channel.chunks) == 3)
        scene.bench.service.failed(rids[1], Code.INTERNAL, "oops")
        with pytest.raises(RuntimeError, match="oops"):
            await task
        assert sorted((chunk["index"], chunk["token_ids"]) for chunk in channel.chunks) == [(0, [0]), (1, [1]), (2, [2])]
        await scene.bench.until(lambda: sorted(scene.bench.backend.aborted) == sorted([rids[0], rids[2]]))

    run(tmp_path, test)


def test_an_opening_is_pushed_before_the_engine_has_said_anything(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        scene.handler = Handler(scene.client, ROLES["prefill"], lambda: "")
        channel = Channel()
        task, rid = await started(scene, 1, channel)
        await scene.bench.until(lambda: len(channel.chunks) == 1)
        assert "disaggregated_params" in channel.chunks[0]
        scene.tokens(rid, 9, finish={"type": "length"})
        await task

    run(tmp_path, test)
