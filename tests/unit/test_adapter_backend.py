"""Requests through the adapter with a stand-in for SGLang: exactly one end for each, and aborts before and after dispatch."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from procs.engine.adapter import backend as module
from procs.engine.adapter.backend import SglangBackend
from procs.engine.adapter.calls import Answer
from procs.engine.adapter.requests import Requests
from shared.errors import Code, RequestError

RID = "a" * 32
ABORT = {"type": "abort", "message": "Aborted"}


class Sink:
    """What left, in order: (rid, tokens, finish, meta, text) or (rid, code, message)."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []
        self.heard = asyncio.Event()

    def output(self, *what: Any) -> None:
        self.said.append(what)
        self.heard.set()

    failed = output

    async def next(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.said) < count:
                self.heard.clear()
                await self.heard.wait()


class Manager:
    """SGLang's tokenizer manager, as far as aborts go."""

    def __init__(self) -> None:
        self.rid_to_state: dict[str, Any] = {}
        self.aborted: list[str] = []

    def abort_request(self, rid: str) -> None:
        self.aborted.append(rid)


class Calls:
    """Streams by the test's own queue: an answer, an exception to raise, or None for the end."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[Any] = asyncio.Queue()
        self.refusal: Exception | None = None
        self.asked: list[dict[str, Any]] = []

    async def stream(self, rid: str, payload: dict[str, Any]) -> AsyncIterator[Answer]:
        self.asked.append(payload)
        if self.refusal is not None:
            raise self.refusal
        return self._stream()

    async def _stream(self) -> AsyncIterator[Answer]:
        while (answer := await self.answers.get()) is not None:
            if isinstance(answer, Exception):
                raise answer
            yield answer


class Scene:
    def __init__(self) -> None:
        self.sink, self.manager, self.calls = Sink(), Manager(), Calls()
        self.routes = SimpleNamespace(asleep=False)
        self.backend = SglangBackend.__new__(SglangBackend)  # without the engine that its constructor builds
        for name, value in {
            "_manager": self.manager,
            "_routes": self.routes,
            "_calls": self.calls,
            "_sink": self.sink,
            "_requests": Requests(),
            "_readers": {},
            "_repeats_aborts": False,
        }.items():
            setattr(self.backend, name, value)

    def submit(self, **payload: Any) -> None:
        self.backend.submit(RID, {"input_ids": [5], "sampling_params": {}, **payload})

    def answer(self, *tokens: int, finish: dict[str, Any] | None = None, **more: Any) -> None:
        info = {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0, "finish_reason": finish}
        self.calls.answers.put_nowait({"output_ids": list(tokens), "meta_info": info, **more})

    async def settled(self) -> None:
        """Every task of the backend has ended."""
        async with asyncio.timeout(5):
            while self.backend._requests.tasks:
                await asyncio.wait(self.backend._requests.tasks.values())


def run(test: Callable[[Scene], Awaitable[None]]) -> None:
    async def main() -> None:
        scene = Scene()
        await test(scene)
        await scene.settled()

    asyncio.run(main())


USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0}


def test_tokens_go_to_the_sink_and_text_only_where_text_is_asked_for() -> None:
    async def test(scene: Scene) -> None:
        scene.submit()
        scene.answer(7, text="a")
        scene.answer()
        scene.answer(8, text="b")
        scene.answer(finish={"type": "stop"}, text="")
        scene.calls.answers.put_nowait(None)
        await scene.settled()
        assert scene.sink.said == [
            (RID, [7], None, USAGE, None),
            (RID, [8], None, None, None),
            (RID, [], {"type": "stop"}, USAGE, None),
        ]
        scene.submit(call="text")
        scene.answer(7, finish={"type": "stop"}, text="a")
        scene.calls.answers.put_nowait(None)
        await scene.settled()
        assert scene.sink.said[3:] == [(RID, [7], {"type": "stop"}, USAGE, "a")]

    run(test)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RequestError(Code.INVALID, "no"), Code.INVALID, "no"),
        (ValueError("too long"), Code.INVALID, "too long"),
        (TypeError("a number"), Code.INVALID, "a number"),
        (RuntimeError("oops"), Code.INTERNAL, "RuntimeError: oops"),
        (KeyError("x"), Code.INTERNAL, "KeyError: 'x'"),
    ],
)
@pytest.mark.parametrize("early", [True, False])
def test_a_failure_is_one_end_of_its_kind_before_the_stream_and_in_it(
    error: Exception, code: Code, message: str, early: bool
) -> None:
    async def test(scene: Scene) -> None:
        if early:
            scene.calls.refusal = error
        else:
            scene.answer(7)
            scene.calls.answers.put_nowait(error)
        scene.submit()
        await scene.settled()
        assert scene.sink.said[0 if early else 1 :] == [(RID, code, message)]

    run(test)


def test_a_stream_that_ends_without_a_reason_is_a_defect() -> None:
    async def test(scene: Scene) -> None:
        scene.submit()
        scene.answer(7)
        scene.calls.answers.put_nowait(None)
        await scene.settled()
        assert scene.sink.said[-1][1] == Code.INTERNAL and len(scene.sink.said) == 2

    run(test)


def test_no_request_reaches_an_engine_whose_memory_is_released() -> None:
    async def test(scene: Scene) -> None:
        scene.routes.asleep = True
        scene.submit()
        assert [what[:2] for what in scene.sink.said] == [(RID, Code.OVERLOADED)] and scene.calls.asked == []

    run(test)


def test_a_follower_takes_no_request() -> None:
    async def test(scene: Scene) -> None:
        scene.backend._manager = None
        scene.submit()
        assert [what[:2] for what in scene.sink.said] == [(RID, Code.INVALID)]
        with pytest.raises(ValueError, match="rank 0"):
            await scene.backend.control("route", {"path": "x", "body": {}})

    run(test)


# --- aborts --------------------------------------------------------------------------------------------------------------


def state(dispatched: float) -> Any:
    return SimpleNamespace(time_stats=SimpleNamespace(api_server_dispatch_finish_time=dispatched), abort_sent=True)


@pytest.mark.parametrize("known", [False, True])
def test_a_request_that_the_scheduler_doesn_t_have_yet_is_cancelled_with_a_terminal_abort(known: bool) -> None:
    async def test(scene: Scene) -> None:
        if known:
            scene.manager.rid_to_state[RID] = state(0.0)
        scene.submit()
        while not scene.calls.asked:  # noqa: ASYNC110 - the stand-in has no event for it
            await asyncio.sleep(0)
        scene.backend.abort(RID)
        await scene.settled()
        assert scene.sink.said == [(RID, [], ABORT, None)] and scene.manager.aborted == []

    run(test)


def test_a_request_that_is_aborted_before_it_has_begun_ends_too() -> None:
    async def test(scene: Scene) -> None:
        scene.submit()
        scene.backend.abort(RID)
        await scene.settled()
        assert scene.sink.said == [(RID, [], ABORT, None)]

    run(test)


@pytest.mark.parametrize("stats", [state(12.5), SimpleNamespace()])
def test_a_dispatched_request_is_ended_by_sglang(stats: Any) -> None:
    async def test(scene: Scene) -> None:
        scene.submit()
        scene.manager.rid_to_state[RID] = stats
        scene.answer(7)
        await scene.sink.next(1)
        scene.backend.abort(RID)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert scene.manager.aborted == [RID] and RID in scene.backend._requests.tasks
        scene.answer(finish={"type": "abort"})
        scene.calls.answers.put_nowait(None)
        await scene.settled()
        assert [what[2] for what in scene.sink.said] == [None, {"type": "abort"}]

    run(test)


def test_an_unknown_id_is_ignored() -> None:
    async def test(scene: Scene) -> None:
        scene.manager.rid_to_state["other"] = state(1.0)
        scene.backend.abort("other")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert scene.manager.aborted == [] and scene.sink.said == []

    run(test)


def test_an_abort_is_repeated_while_ranks_may_have_heard_it_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ABORT_RETRY_SECONDS", (0.0, 0.0, 0.0, 0.0))

    async def test(scene: Scene) -> None:
        scene.backend._repeats_aborts = True
        running = scene.manager.rid_to_state[RID] = state(1.0)
        scene.submit()
        scene.backend.abort(RID)
        while len(scene.manager.aborted) < 3:  # noqa: ASYNC110 - the stand-in has no event for it
            await asyncio.sleep(0)
        assert running.abort_sent is False, "SGLang would leave a second one out"
        scene.manager.rid_to_state[RID] = state(1.0)
        count = len(scene.manager.aborted)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(scene.manager.aborted) == count, "another request of that id is not its own"
        scene.answer(finish={"type": "abort"})
        scene.calls.answers.put_nowait(None)

    run(test)


def test_a_task_that_ends_with_the_process_says_so() -> None:
    async def test(scene: Scene) -> None:
        scene.submit()
        while not scene.calls.asked:  # noqa: ASYNC110 - the stand-in has no event for it
            await asyncio.sleep(0)
        scene.backend._requests.tasks[RID].cancel()
        await scene.settled()
        assert scene.sink.said == [(RID, Code.ENGINE_DEAD, "the engine is stopping")]

    run(test)


# --- controls ------------------------------------------------------------------------------------------------------------


def test_controls_go_to_routes_and_adapters_and_no_other_is_known() -> None:
    async def test(scene: Scene) -> None:
        asked: list[Any] = []

        async def call(*what: Any) -> Any:
            asked.append(what)
            return {"status": "ok"}

        scene.routes.call = scene.routes.adapter = call
        assert await scene.backend.control("route", {"path": "x", "body": [1]}) == {"status": "ok"}
        for op in ("load_lora", "unload_lora", "list_loras", "clear_kv_blocks"):
            await scene.backend.control(op, {})
        assert asked == [("x", [1]), *((op, None) for op in ("load_lora", "unload_lora", "list_loras", "clear_kv_blocks"))]
        with pytest.raises(ValueError, match="unknown control 'nope'"):
            await scene.backend.control("nope", {})

    run(test)


# --- uploads -------------------------------------------------------------------------------------------------------------


def test_a_choice_s_metadata_goes_to_the_client_s_store_and_only_usage_to_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[tuple[str, int, Any]] = []

    class Uploader:
        def __init__(self, url: str) -> None:
            self.url = url

        async def upload_choice(self, index: int, info: Any) -> None:
            stored.append((self.url, index, info))

    monkeypatch.setattr("dynamo.common.metadata_upload.MetadataUploader", Uploader)

    async def test(scene: Scene) -> None:
        scene.submit(upload={"url": "file:///x", "index": 2})
        for finish in (None, {"type": "stop"}):
            scene.answer(7, finish=finish)
            scene.calls.answers._queue[-1]["meta_info"].update(  # type: ignore[attr-defined]
                output_token_logprobs=[[-1, 7, None]], routed_experts="b64"
            )
        scene.calls.answers.put_nowait(None)
        await scene.settled()
        assert [what[3] for what in scene.sink.said] == [USAGE, USAGE]
        ((url, index, info),) = stored
        assert (url, index, info["routed_experts"]) == ("file:///x", 2, "b64") and info["output_token_logprobs"]
        assert "upload" not in scene.calls.asked[0]

    run(test)
