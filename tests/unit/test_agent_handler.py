"""One request through the agent's handler: failures by type, cancellation, samples, the cut of a drain."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dynamo.llm.exceptions import CannotConnect, Disconnected, EngineShutdown, HttpError, InvalidArgument
from msgspec.structs import replace as replace_struct
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from procs.agent.drain import CUT_SECONDS, Drain
from procs.agent.failures import abort_exception, exception
from procs.agent.handler import Handler
from procs.agent.media import Intake
from procs.agent.tracing import Tracing
from shared.config import MediaLimits
from shared.engine_client import EngineClient
from shared.errors import Code, RequestError
from shared.frames import Beat, Death
from shared.roles import ROLES, find
from shared.roles.role import Media, Role
from tests.unit.test_service import INCARNATION, Bench, bench_at

REQUEST = {"token_ids": [5, 6], "stop_conditions": {"max_tokens": 10}}


class Context:
    """Stands for Dynamo's: the test kills it."""

    def __init__(self) -> None:
        self.killed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.first = 0
        self.headers: dict[str, str] | None = None

    def id(self) -> str:
        return "ctx"

    def async_killed_or_stopped(self) -> "asyncio.Future[bool]":
        return self.killed

    def trace_headers(self) -> dict[str, str] | None:
        return self.headers

    def notify_first_token(self) -> None:
        self.first += 1


class Scene:
    def __init__(self, bench: Bench, client: EngineClient, role: Role) -> None:
        self.bench = bench
        self.client = client
        self.refusing = ""
        self.handler = Handler(client, role, lambda: self.refusing)
        self.context = Context()

    def call(self, **more: Any) -> AsyncIterator[dict[str, Any]]:
        return self.handler.generate({**REQUEST, **more}, self.context)

    async def submitted(self, count: int = 1) -> list[str]:
        await self.bench.until(lambda: len(self.bench.backend.submitted) == count)
        return list(self.bench.backend.submitted)

    def tokens(
        self,
        rid: str,
        *ids: int,
        finish: dict[str, Any] | None = None,
        meta: dict[str, Any] | None = None,
        text: str | None = None,
    ) -> None:
        self.bench.service.output(rid, list(ids), finish, meta, text)


def run(directory: Path, test: Callable[[Scene], Awaitable[None]], role: Role = ROLES["aggregated"]) -> None:
    async def main() -> None:
        async with bench_at(directory) as bench:
            client = EngineClient(directory, "agent:0")
            client.hear_beat(Beat("engine", 1, "ready", "", 0.0, "", INCARNATION, 0))
            await bench.until(lambda: client.welcome is not None)
            scene = Scene(bench, client, role)
            try:
                await test(scene)
                assert scene.handler.running == 0 and not scene.handler._streams
            finally:
                client.close()

    asyncio.run(main())


def test_tokens_arrive_and_the_first_is_announced_once(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        chunks = asyncio.create_task(collect(scene.call()))
        (rid,) = await scene.submitted()
        scene.tokens(rid, 1)
        await asyncio.sleep(0.02)
        scene.tokens(rid, 2, finish={"type": "stop"})
        assert [chunk["token_ids"] for chunk in await chunks] == [[1], [2]]
        assert scene.context.first == 1 and scene.context.killed.cancelled()

    run(tmp_path, test)


async def collect(chunks: AsyncIterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return [chunk async for chunk in chunks]


def test_samples_are_requests_of_their_own_and_come_with_their_index(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        collecting = asyncio.create_task(collect(scene.call(sampling_options={"n": 3, "seed": 7})))
        rids = await scene.submitted(3)
        seeds = [scene.bench.backend.submitted[rid]["sampling_params"]["sampling_seed"] for rid in rids]
        assert seeds == [7, 8, 9]
        for number, rid in enumerate(rids):
            scene.tokens(rid, number, finish={"type": "length"})
        chunks = await collecting
        assert sorted((chunk["index"], chunk["token_ids"][0]) for chunk in chunks) == [(0, 0), (1, 1), (2, 2)]

    run(tmp_path, test)


def test_one_failed_sample_ends_the_request_and_aborts_the_others(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        collecting = asyncio.create_task(collect(scene.call(sampling_options={"n": 2})))
        first, second = await scene.submitted(2)
        scene.bench.service.failed(first, Code.INTERNAL, "oops")
        with pytest.raises(RuntimeError, match="oops"):
            await collecting
        await scene.bench.until(lambda: scene.bench.backend.aborted == [second])

    run(tmp_path, test)


def test_a_client_that_goes_aborts_and_the_terminal_output_is_waited_for(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        collecting = asyncio.create_task(collect(scene.call()))
        (rid,) = await scene.submitted()
        scene.tokens(rid, 1)
        await asyncio.sleep(0.02)
        scene.context.killed.set_result(True)
        await scene.bench.until(lambda: scene.bench.backend.aborted == [rid])
        assert not collecting.done()
        scene.tokens(rid, 2, finish={"type": "abort"})
        assert [chunk["token_ids"] for chunk in await collecting] == [[1]]

    run(tmp_path, test)


def test_a_reader_that_stops_in_mid_stream_aborts(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        chunks = scene.handler.generate(REQUEST, scene.context)
        pulling = asyncio.ensure_future(anext(chunks))
        (rid,) = await scene.submitted()
        scene.tokens(rid, 1)
        await pulling
        await chunks.aclose()  # type: ignore[attr-defined]
        await scene.bench.until(lambda: scene.bench.backend.aborted == [rid])

    run(tmp_path, test)


def test_death_of_the_engine_in_mid_stream_migrates(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        collecting = asyncio.create_task(collect(scene.call()))
        (rid,) = await scene.submitted()
        scene.tokens(rid, 1)
        await asyncio.sleep(0.02)
        scene.client.hear_death(Death(INCARNATION, "scheduler", 1, "killed", 0.0))
        with pytest.raises(EngineShutdown):
            await collecting
        with pytest.raises(EngineShutdown):
            await collect(scene.call())

    run(tmp_path, test)


def test_the_cut_ends_what_runs_and_nothing_that_comes_later(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        collecting = asyncio.create_task(collect(scene.call()))
        (rid,) = await scene.submitted()
        scene.handler.cut()
        with pytest.raises(EngineShutdown):
            await collecting
        await scene.bench.until(lambda: scene.bench.backend.aborted == [rid])
        scene.context = Context()
        later = asyncio.create_task(collect(scene.call()))
        rids = await scene.submitted(2)
        scene.tokens(rids[1], 1, finish={"type": "stop"})
        assert len(await later) == 1

    run(tmp_path, test)


class Fetching(Intake):
    """Media that come when the test says so."""

    def __init__(self) -> None:
        super().__init__(MediaLimits())
        self.asked = asyncio.Event()
        self.come = asyncio.Event()

    async def gather(self, data: Any) -> Media:
        self.asked.set()
        await self.come.wait()
        self.held += 3
        return Media(["image"], [b"png"], held=3)


IMAGE = {"multi_modal_data": {"image_url": [{"Url": "https://example.com/a.png"}]}}


def with_images(test: Callable[[Scene, Fetching], Awaitable[None]]) -> Callable[[Scene], Awaitable[None]]:
    async def made(scene: Scene) -> None:
        assert scene.client.welcome is not None
        scene.client.welcome = replace_struct(
            scene.client.welcome, facts=replace_struct(scene.client.welcome.facts, media=["image"])
        )
        scene.handler.intake = fetching = Fetching()
        await test(scene, fetching)
        assert fetching.held == 0 and not scene.handler._gathering

    return made


def test_a_request_whose_image_is_fetched_when_the_drain_begins_is_served(tmp_path: Path) -> None:
    async def test(scene: Scene, fetching: Fetching) -> None:
        chunks = asyncio.create_task(collect(scene.call(**IMAGE)))
        await fetching.asked.wait()
        scene.refusing = "the node is draining"
        fetching.come.set()
        (rid,) = await scene.submitted()
        assert scene.bench.backend.submitted[rid]["blobs"] == [b"png"]
        scene.tokens(rid, 1, finish={"type": "stop"})
        assert len(await chunks) == 1

    run(tmp_path, with_images(test))


def test_the_cut_ends_what_is_being_fetched(tmp_path: Path) -> None:
    async def test(scene: Scene, fetching: Fetching) -> None:
        chunks = asyncio.create_task(collect(scene.call(**IMAGE)))
        await fetching.asked.wait()
        scene.handler.cut()
        with pytest.raises(EngineShutdown, match="stopping"):
            await chunks

    run(tmp_path, with_images(test))


def test_a_client_that_goes_ends_the_fetching(tmp_path: Path) -> None:
    async def test(scene: Scene, fetching: Fetching) -> None:
        chunks = asyncio.create_task(collect(scene.call(**IMAGE)))
        await fetching.asked.wait()
        scene.context.killed.set_result(True)
        assert await chunks == []

    run(tmp_path, with_images(test))


def test_what_the_model_takes_not_is_not_even_fetched(tmp_path: Path) -> None:
    async def test(scene: Scene, fetching: Fetching) -> None:
        with pytest.raises(InvalidArgument, match="video"):
            await collect(scene.call(multi_modal_data={"video_url": [{"Url": "https://example.com/a.mp4"}]}))
        assert not fetching.asked.is_set()

    run(tmp_path, with_images(test))


def test_refusals_and_bad_requests_never_reach_the_engine(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        with pytest.raises(InvalidArgument, match="token_ids"):
            await collect(scene.call(token_ids=[10_000]))
        scene.refusing = "the node is draining"
        with pytest.raises(EngineShutdown, match="draining"):
            await collect(scene.call())
        assert scene.bench.backend.submitted == {}

    run(tmp_path, test)


@pytest.mark.parametrize("request_", [[1], "text", None, 5])
def test_what_is_no_object_is_a_bad_request(tmp_path: Path, request_: Any) -> None:
    async def test(scene: Scene) -> None:
        with pytest.raises(InvalidArgument, match="expected an object"):
            await collect(scene.handler.generate(request_, scene.context))

    run(tmp_path, test)


def test_what_no_frame_can_carry_is_refused_and_forgotten(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        with pytest.raises(InvalidArgument, match="can't be passed on"):
            await collect(scene.call(sampling_options={"n": 2, "seed": 2**64 - 1}))
        assert scene.client.inflight == 1, "the first sample was submitted and is aborted"
        (rid,) = await scene.submitted()
        await scene.bench.until(lambda: scene.bench.backend.aborted == [rid])
        scene.tokens(rid, finish={"type": "abort"})
        await scene.bench.until(lambda: scene.client.inflight == 0)

    run(tmp_path, test)


def test_a_defect_of_a_role_is_an_internal_error_and_never_a_bad_request(tmp_path: Path) -> None:
    def broken(_: Any) -> Any:
        raise KeyError("oops")

    async def test(scene: Scene) -> None:
        with pytest.raises(RuntimeError, match="KeyError: 'oops'"):
            await collect(scene.call())
        assert scene.bench.backend.submitted == {}

    run(tmp_path, test, replace(ROLES["aggregated"], to_engine=broken))


def test_a_chunk_that_the_role_refuses_ends_the_request_and_aborts_it(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        call = scene.handler.generate({"model": "m", "input": "a", "dimensions": 9}, scene.context)
        collecting = asyncio.create_task(collect(call))
        (rid,) = await scene.submitted()
        scene.tokens(rid, finish={"type": "stop"}, meta={"vectors": [b"\x00" * 8], "prompt_tokens": 1})
        with pytest.raises(InvalidArgument, match="dimensions=9 exceeds model embedding dimension 2"):
            await collecting

    run(tmp_path, test, ROLES["embedding"])


# --- prefill: its stream ends when the transfer has -----------------------------------------------------------------------

USAGE = {"prompt_tokens": 2, "completion_tokens": 1, "cached_tokens": 1}


def test_a_prefill_s_opening_leaves_before_the_engine_has_said_anything(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        call = scene.call(bootstrap_info={"bootstrap_host": "192.0.2.7", "bootstrap_port": 9000, "bootstrap_room": 7})
        opening = await anext(call)
        assert opening["disaggregated_params"]["bootstrap_room"] == 7 and scene.context.first == 0
        (rid,) = await scene.submitted()
        assert scene.bench.backend.submitted[rid]["bootstrap_room"] == 7
        rest = asyncio.create_task(collect(call))
        scene.tokens(rid, 9, meta=USAGE)
        scene.tokens(rid, finish={"type": "length"}, meta=USAGE)
        report = {"kv_cache_hit": {"prompt_tokens": 2, "reused_tokens": 1}}
        assert await rest == [{"token_ids": [], "engine_data": report}] and scene.context.first == 1

    run(tmp_path, test, ROLES["prefill"])


def test_a_prefill_of_which_nothing_is_known_ends_without_a_chunk(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        collecting = asyncio.create_task(collect(scene.call()))
        (rid,) = await scene.submitted()
        scene.tokens(rid, 9, finish={"type": "length"})
        (opening,) = await collecting
        assert "disaggregated_params" in opening and scene.context.first == 1

    run(tmp_path, test, ROLES["prefill"])


def test_an_aborted_prefill_is_waited_for_until_the_engine_has_ended_it(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        call = scene.call()
        await anext(call)
        (rid,) = await scene.submitted()
        rest = asyncio.create_task(collect(call))
        scene.context.killed.set_result(True)
        await scene.bench.until(lambda: scene.bench.backend.aborted == [rid])
        assert not rest.done() and scene.handler.running == 1
        scene.tokens(rid, finish={"type": "abort"}, meta=USAGE)
        assert await rest == []

    run(tmp_path, test, ROLES["prefill"])


def test_a_reader_that_leaves_at_the_opening_aborts(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        call = scene.call()
        await anext(call)
        (rid,) = await scene.submitted()
        await call.aclose()  # type: ignore[attr-defined]
        await scene.bench.until(lambda: scene.bench.backend.aborted == [rid])

    run(tmp_path, test, ROLES["prefill"])


def test_a_prefill_that_is_refused_opens_nothing(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        with pytest.raises(InvalidArgument, match="n=1"):
            await collect(scene.call(sampling_options={"n": 2}))
        with pytest.raises(InvalidArgument, match="token_ids"):
            await collect(scene.call(token_ids=[]))
        assert scene.bench.backend.submitted == {}

    run(tmp_path, test, ROLES["prefill"])


def test_an_abort_that_nobody_asked_for_fails_the_request_though_its_opening_has_left(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        call = scene.call()
        await anext(call)
        (rid,) = await scene.submitted()
        rest = asyncio.create_task(collect(call))
        scene.tokens(rid, finish={"type": "abort"})
        with pytest.raises(EngineShutdown):
            await rest

    run(tmp_path, test, ROLES["prefill"])


def test_text_is_joined_for_a_busy_reader(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        call = scene.handler.generate({"prompt": "hi"}, scene.context)
        first = asyncio.ensure_future(anext(call))
        (rid,) = await scene.submitted()
        scene.tokens(rid, 1, text="a")
        assert (await first)["choices"][0]["delta"]["content"] == "a"
        scene.tokens(rid, 2, text="b")
        scene.tokens(rid, 3, text="c", finish={"type": "stop"})
        await scene.bench.until(lambda: all(stream.ended for stream in scene.handler._streams))
        (rest,) = await collect(call)
        assert rest["choices"][0] == {"index": 0, "delta": {"role": "assistant", "content": "bc"}, "finish_reason": "stop"}

    run(tmp_path, test, find("aggregated", text=True))


def test_which_exception_a_failure_raises() -> None:
    def of(code: Code, started: bool) -> type[Exception]:
        return type(exception(RequestError(code, "x"), started=started))

    for started in (False, True):
        assert of(Code.INVALID, started) is InvalidArgument
        assert {of(code, started) for code in (Code.ENGINE_DEAD, Code.DRAINING, Code.STALE)} == {EngineShutdown}
        assert of(Code.INTERNAL, started) is RuntimeError
    for code in (Code.GAP, Code.STALLED, Code.OVERLOADED):
        assert of(code, True) is Disconnected and of(code, False) is CannotConnect


def test_which_exception_an_abort_of_the_engine_raises() -> None:
    assert type(abort_exception({"type": "abort"})) is EngineShutdown
    assert type(abort_exception({"type": "abort", "status_code": 400, "message": "m" * 10_000})) is InvalidArgument
    assert type(abort_exception({"type": "abort", "status_code": 503})) is HttpError
    assert type(abort_exception({"type": "abort", "err_type": "X", "status_code": True})) is HttpError


def test_the_order_of_a_drain() -> None:
    drain = Drain(grace=5.0, timeout=300.0, started=100.0)
    grace = drain.look(101.0, running=2, withdrawn_at=100.0, hurry=False)
    assert not grace.refuse and not grace.cut and grace.detail == "draining: 2 streams left, 299 s of 300"
    assert not drain.look(101.0, running=0, withdrawn_at=100.0, hurry=False).done
    after = drain.look(105.0, running=1, withdrawn_at=100.0, hurry=False)
    assert after.refuse and not after.cut and not after.done
    late = drain.look(400.0, running=1, withdrawn_at=100.0, hurry=False)
    assert late.cut and not late.done
    assert drain.look(400.1, running=0, withdrawn_at=100.0, hurry=False).done
    assert drain.look(400.0 + CUT_SECONDS, running=1, withdrawn_at=100.0, hurry=False).done, "a stuck client holds nothing up"


def test_a_drain_skips_the_grace_when_no_router_ever_knew_the_worker_and_in_a_hurry() -> None:
    assert Drain(5.0, 300.0, 0.0).look(0.0, running=0, withdrawn_at=None, hurry=False).done
    hurried = Drain(5.0, 300.0, 0.0)
    assert hurried.look(0.1, running=1, withdrawn_at=0.0, hurry=True).cut
    assert hurried.look(0.2, running=0, withdrawn_at=0.0, hurry=True).done


def test_one_id_is_in_the_lines_of_agent_and_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(scene: Scene) -> None:
        scene.context.headers = {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}
        collecting = asyncio.create_task(collect(scene.call()))
        (rid,) = await scene.submitted()
        scene.tokens(rid, 1, finish={"type": "abort", "message": "x"})
        with pytest.raises(EngineShutdown):
            await collecting
        lines = [record for record in caplog.records if "Request ID" in record.message]
        assert [(record.levelname, record.message) for record in lines] == [
            ("DEBUG", "New Request ID: ctx"),
            ("INFO", f"Submitted SGLang Request ID: {rid}, Context: ctx"),
            ("DEBUG", f"New SGLang Request ID: {rid}, Context: ctx"),
            ("INFO", f"Aborted Request ID: {rid}, Context: ctx, after 1 tokens"),
        ]
        assert [record.__dict__["request_id"] for record in lines] == ["ctx"] * 4
        assert lines[1].__dict__["trace_id"] == "a" * 32 and lines[1].__dict__["rid"] == rid

    with caplog.at_level("DEBUG"):
        run(tmp_path, test)


def test_a_request_has_a_span_with_its_end(tmp_path: Path) -> None:
    exporter = InMemorySpanExporter()

    async def test(scene: Scene) -> None:
        scene.handler.tracing = Tracing("agent:0", "n", exporter)
        collecting = asyncio.create_task(collect(scene.call()))
        (rid,) = await scene.submitted()
        scene.tokens(rid, 1, 2, finish={"type": "stop"})
        await collecting
        failing = asyncio.create_task(collect(scene.call()))
        _, second = await scene.submitted(2)
        scene.bench.service.failed(second, Code.INTERNAL, "oops")
        with pytest.raises(RuntimeError, match="oops"):
            await failing
        scene.refusing = "draining"
        with pytest.raises(EngineShutdown):
            await collect(scene.call())
        scene.handler.tracing.close()
        ends = [(dict(span.attributes or {}).get("error.type"), len(span.events)) for span in exporter.get_finished_spans()]
        assert ends == [(None, 1), (str(Code.INTERNAL), 0), (str(Code.DRAINING), 0)]

    run(tmp_path, test)
