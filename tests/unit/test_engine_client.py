"""The peer's end against a real Service: lives, gaps, merging, credit."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from shared.engine_client import EngineClient
from shared.errors import Code, RequestError
from shared.frames import Beat, Death, Output, Step
from shared.sockets import REQUEST_MAX_BYTES
from shared.state import BEAT_DEADLINE_SECONDS
from tests.unit.test_service import INCARNATION, Bench, bench_at


def beat(incarnation: int = INCARNATION, state: str = "ready") -> Beat:
    return Beat("engine", 1, state, "", 0.0, "", incarnation, 0)


def run(directory: Path, test: Callable[[Bench, EngineClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with bench_at(directory) as bench:
            client = EngineClient(directory, "agent:0")
            client.hear_beat(beat(state="loading"))
            assert client.welcome is None
            client.hear_beat(beat())
            await bench.until(lambda: client.welcome is not None)
            try:
                await test(bench, client)
            finally:
                client.close()

    asyncio.run(main())


def test_tokens_that_wait_for_a_busy_reader_come_as_one_output(tmp_path: Path) -> None:
    async def test(bench: Bench, client: EngineClient) -> None:
        stream = client.submit({"input_ids": [1]})
        await bench.until(lambda: stream.rid in bench.backend.submitted)
        for number in range(1000):
            bench.service.output(stream.rid, [number], {"type": "length"} if number == 999 else None, None)
            if number % 10 == 0:
                await asyncio.sleep(0)
        await bench.until(lambda: stream.ended)
        outputs = [output async for output in stream]
        assert [token for output in outputs for token in output.token_ids] == list(range(1000))
        assert len(outputs) == 1 and client.inflight == 0

    run(tmp_path, test)


def test_credit_keeps_a_long_stream_flowing(tmp_path: Path) -> None:
    async def test(bench: Bench, client: EngineClient) -> None:
        stream = client.submit({"input_ids": [1]})
        await bench.until(lambda: stream.rid in bench.backend.submitted)

        async def produce() -> None:
            for number in range(500):
                bench.service.output(stream.rid, [number], {"type": "length"} if number == 499 else None, None)
                await asyncio.sleep(0.0005)

        producing = asyncio.create_task(produce())
        tokens = [token async for output in stream for token in output.token_ids]
        await producing
        assert tokens == list(range(500))

    run(tmp_path, test)


def test_blobs_travel_beside_their_frames(tmp_path: Path) -> None:
    async def test(bench: Bench, client: EngineClient) -> None:
        image, clip = bytes(range(256)) * 4096, b"short"
        payload = {"input_ids": [1], "blobs": [image, memoryview(clip)]}
        streams = [client.submit(payload), client.submit({"input_ids": [2]})]
        await bench.until(lambda: len(bench.backend.submitted) == 2)
        submitted = [bench.backend.submitted[stream.rid] for stream in streams]
        assert submitted[0] == {"input_ids": [1], "blobs": [image, clip]} and submitted[1] == {"input_ids": [2]}
        assert payload["blobs"] == [image, clip], "the payload is as it was"
        for stream, meta in zip(streams, ({"blobs": [image, image], "kind": "png"}, {"blobs": [clip]}), strict=True):
            bench.service.output(stream.rid, [], {"type": "stop"}, meta)
        answers = [await anext(aiter(stream)) for stream in streams]
        assert answers[0].meta == {"blobs": [image, image], "kind": "png"} and answers[1].meta == {"blobs": [clip]}

    run(tmp_path, test)


def test_a_blob_past_the_bound_costs_its_own_request_alone(tmp_path: Path) -> None:
    async def test(bench: Bench, client: EngineClient) -> None:
        large = bytes(REQUEST_MAX_BYTES + 1)
        with pytest.raises(RequestError) as caught:
            client.submit({"blobs": [large]})
        assert caught.value.code == Code.INVALID
        bad, good = client.submit({}), client.submit({})
        await bench.until(lambda: len(bench.backend.submitted) == 2)
        bench.service.output(bad.rid, [], {"type": "stop"}, {"blobs": [large]})
        bench.service.output(good.rid, [], {"type": "stop"}, {"blobs": [b"small"]})
        assert [output.meta async for output in good] == [{"blobs": [b"small"]}]
        with pytest.raises(RequestError) as caught:
            await anext(aiter(bad))
        assert caught.value.code == Code.INTERNAL and "at most" in caught.value.message

    run(tmp_path, test)


def test_death_ends_every_stream_with_the_migratable_code(tmp_path: Path) -> None:
    async def test(bench: Bench, client: EngineClient) -> None:
        streams = [client.submit({"input_ids": [1]}) for _ in range(3)]
        client.hear_death(Death(INCARNATION, "scheduler", 1, "scheduler (pid 1) killed by SIGKILL", 0.0))
        for stream in streams:
            with pytest.raises(RequestError) as caught:
                await anext(aiter(stream))
            assert caught.value.code == Code.ENGINE_DEAD and "SIGKILL" in caught.value.message
        with pytest.raises(RequestError):
            client.submit({"input_ids": [1]})
        client.hear_beat(beat())
        assert client.welcome is None, "a late beat of a dead engine revives nothing"
        client.hear_beat(beat(INCARNATION + 1))
        assert client.inflight == 0

    run(tmp_path, test)


def test_a_gap_is_a_failure_of_its_stream_alone(tmp_path: Path) -> None:
    async def test(bench: Bench, client: EngineClient) -> None:
        broken, whole = client.submit({"input_ids": [1]}), client.submit({"input_ids": [2]})
        await bench.until(lambda: len(bench.backend.submitted) == 2)
        client._step(Step(INCARNATION, 1, [Output(broken.rid, 1, [5]), Output(whole.rid, 0, [6], {"type": "stop"})]))
        with pytest.raises(RequestError) as caught:
            await anext(aiter(broken))
        assert caught.value.code == Code.GAP
        await bench.until(lambda: bench.backend.aborted == [broken.rid])
        assert [output.token_ids async for output in whole] == [[6]]

    run(tmp_path, test)


def test_controls(tmp_path: Path) -> None:
    async def test(bench: Bench, client: EngineClient) -> None:
        assert await client.control("echo", {"a": 1}) == {"a": 1}
        with pytest.raises(RequestError, match="unknown control"):
            await client.control("nope", {})

    run(tmp_path, test)


def test_a_control_that_can_t_be_sent_or_whose_engine_goes_ends_at_once(tmp_path: Path) -> None:
    async def test(bench: Bench, client: EngineClient) -> None:
        with pytest.raises(RequestError, match="can't be passed on") as caught:
            await client.control("echo", {"a": 2**64})
        assert caught.value.code == Code.INVALID
        with pytest.raises(RequestError, match="67108864 at most") as caught:
            await client.control("echo", {"a": b"\0" * (64 << 20)})
        assert caught.value.code == Code.INVALID
        assert await client.control("echo", {"a": 1}) == {"a": 1}, "the connection has outlived it"

        async def never(op: str, args: dict[str, Any]) -> Any:
            await asyncio.Event().wait()

        bench.backend.control = never  # type: ignore[method-assign]
        waiting = asyncio.create_task(client.control("echo", {}))
        await bench.until(lambda: len(bench.service._controls) == 1)
        client.hear_death(Death(INCARNATION, "scheduler", 1, "killed", 0.0))
        with pytest.raises(RequestError) as caught:
            await waiting
        assert caught.value.code == Code.ENGINE_DEAD and not client._controls
        with pytest.raises(RequestError, match="no engine is up"):
            await client.control("echo", {})

    run(tmp_path, test)


def test_a_control_without_an_answer_in_time_is_said_by_name(tmp_path: Path) -> None:
    async def test(bench: Bench, client: EngineClient) -> None:
        async def never(op: str, args: dict[str, Any]) -> Any:
            await asyncio.Event().wait()

        bench.backend.control = never  # type: ignore[method-assign]
        with pytest.raises(RequestError, match="echo: no answer within") as caught:
            await client.control("echo", {}, 0.01)
        assert caught.value.code == Code.INTERNAL and not client._controls

    run(tmp_path, test)


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, "\ud800", object()])
def test_a_request_that_no_frame_can_carry_leaves_nothing(tmp_path: Path, value: Any) -> None:
    async def test(bench: Bench, client: EngineClient) -> None:
        with pytest.raises(RequestError, match="can't be passed on") as caught:
            client.submit({"input_ids": [1], "x": value})
        assert caught.value.code == Code.INVALID and client.inflight == 0

    run(tmp_path, test)


def test_silence_of_engine_and_keeper_ends_streams_and_the_same_engine_may_come_back(tmp_path: Path) -> None:
    async def test(bench: Bench, client: EngineClient) -> None:
        stream = client.submit({"input_ids": [1]})
        client.hear_beat(Beat("keeper", 1, "ready", "", 0.0, "", INCARNATION, 0))
        client._clock += BEAT_DEADLINE_SECONDS + 1
        client.hear_beat(Beat("keeper", 1, "ready", "", 0.0, "", INCARNATION, 0))
        client._watch()
        assert client.welcome is not None, "the keeper lives and would say when the engine dies"
        client._looked -= 3600
        client._watch()
        assert client.welcome is not None, "a pause of this process is nobody's silence"
        client._clock += BEAT_DEADLINE_SECONDS + 1
        client._watch()
        with pytest.raises(RequestError) as caught:
            await anext(aiter(stream))
        assert caught.value.code == Code.ENGINE_DEAD
        client.hear_beat(beat())
        await bench.until(lambda: client.welcome is not None)

    run(tmp_path, test)


def test_an_engine_that_forgot_this_peer_fails_its_streams_alone_and_is_met_again(tmp_path: Path) -> None:
    async def test(bench: Bench, client: EngineClient) -> None:
        stream = client.submit({"input_ids": [1]})
        await bench.until(lambda: stream.rid in bench.backend.submitted)
        bench.service._peers.clear()
        stream.abort()
        with pytest.raises(RequestError) as caught:
            await anext(aiter(stream))
        assert caught.value.code == Code.GAP
        await bench.until(lambda: client.welcome is not None)

    run(tmp_path, test)
