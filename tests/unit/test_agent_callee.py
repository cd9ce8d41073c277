"""Other workers in a request: what their failures become, answers in the engine's place, a worker that is asked first."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from dynamo.llm.exceptions import CannotConnect, Disconnected, EngineShutdown, InvalidArgument

from procs.agent.callee import AHEAD, Call, Callees, failure
from shared.errors import Code, RequestError
from shared.frames import Death
from shared.roles import find
from shared.roles.role import Media
from tests.unit.test_agent_handler import Context, Scene, run
from tests.unit.test_roles_mm import MADE, sent
from tests.unit.test_service import INCARNATION

ENCODED = {"encoded": MADE, "input_ids": [5, 7, 7, 7, 6]}
WHERE = {"bootstrap_host": "192.0.2.7", "bootstrap_room": 77}
"""Without a port: nobody looks whether it is there."""
CHUNK = {"token_ids": [4], "index": 0}
LAST = {"token_ids": [9], "index": 0, "finish_reason": "length"}


class Item:
    """Dynamo's Annotated."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def data(self) -> Any:
        return self._data


class Asked(Context):
    """As Dynamo's, which can be asked several times."""

    stopped = 0

    def async_killed_or_stopped(self) -> "asyncio.Future[bool]":
        return asyncio.shield(self.killed)

    def detached(self, name: str) -> "Asked":
        assert name == self.id()
        return self

    def stop_generating(self) -> None:
        self.stopped += 1


class Client:
    """Stands for Dynamo's: the test speaks for the worker. ``asked`` are the requests; an exception ends the answer with it."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.said: asyncio.Queue[Any] = asyncio.Queue()
        self.dropped = 0
        self.taken = 0

    async def round_robin(self, body: Any, context: Any = None) -> AsyncIterator[Any]:
        self.asked.append((body, context))
        return self._answer()

    async def _answer(self) -> AsyncIterator[Any]:
        try:
            while (item := await self.said.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                self.taken += 1
                yield Item(item)
        except (GeneratorExit, asyncio.CancelledError):
            self.dropped += 1
            raise


# --- failures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (InvalidArgument("no such token"), Code.INVALID, "no such token"),
        (ValueError("Unavailable: the engine is stopping"), Code.PEER_DEAD, "the engine is stopping"),
        (Exception("Unavailable: no instances"), Code.PEER_DEAD, "no instances"),
        (Exception("Internal: boom"), Code.INTERNAL, "boom"),
        (Exception('InvalidRequest: {"message":"too long","code":413}'), Code.INVALID, "too long"),
        (Exception('InvalidRequest: {"message":"oops","code":503}'), Code.INTERNAL, "oops"),
        (Exception("InvalidRequest: no JSON"), Code.INTERNAL, "no JSON"),
        (OSError("connection reset"), Code.PEER_DEAD, "connection reset"),
        (RuntimeError(), Code.PEER_DEAD, "RuntimeError"),
    ],
)
def test_what_dynamo_raises_has_a_type_again(raised: Exception, code: Code, words: str) -> None:
    found = failure(raised, "ns.backend.generate")
    assert (found.code, words in found.message) == (code, True), found


# --- one call ------------------------------------------------------------------------------------------------------------


def test_chunks_come_in_order_and_a_slow_reader_holds_the_worker() -> None:
    async def main() -> None:
        client = Client()
        call = Callees("w", client).call("{}", Asked())
        for number in range(3 * AHEAD):
            client.said.put_nowait(number)
        client.said.put_nowait(None)
        await _turns()
        assert client.taken == AHEAD
        assert [chunk async for chunk in call] == list(range(3 * AHEAD))

    asyncio.run(main())


def test_a_call_that_is_aborted_or_failed_lets_go_of_its_worker() -> None:
    async def main() -> None:
        clients = [Client(), Client()]
        context = Asked()
        aborted, failed = (Callees("w", client).call("{}", context) for client in clients)
        for client in clients:
            client.said.put_nowait(1)
        await _turns()
        aborted.abort()
        failed.fail(RequestError(Code.ENGINE_DEAD, "gone"))
        assert [chunk async for chunk in aborted] == [1]
        with pytest.raises(RequestError, match="gone"):
            await anext(failed)
        await _turns()
        assert [client.dropped for client in clients] == [1, 1] and context.stopped == 2

    asyncio.run(main())


def test_of_an_ignored_call_only_a_failure_is_heard() -> None:
    async def main() -> None:
        client = Client()
        call: Call = Callees("w", client).call("{}", Asked())
        failures: list[RequestError] = []
        call.on_fail = failures.append
        call.ignore()
        for number in range(3 * AHEAD):
            client.said.put_nowait(number)
        client.said.put_nowait(Exception("Unavailable: gone"))
        await _turns()
        assert [error.code for error in failures] == [Code.PEER_DEAD] and client.taken == 3 * AHEAD

    asyncio.run(main())


async def _turns(count: int = 20) -> None:
    for _ in range(count * AHEAD):
        await asyncio.sleep(0)


# --- an answer in the engine's place -------------------------------------------------------------------------------------


class Encode:
    """An encode worker's handler with one image on its way; the test speaks for its engine and for the worker behind it."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        scene.context = Asked()
        self.client = Client()
        scene.handler.callees = Callees("ns.backend.generate", self.client)

        class Intake:
            released = 0

            async def gather(self, data: Any) -> Media:
                return Media(["image"], [b"png"])

            def release(self, media: Media) -> None:
                self.released += 1

        self.intake = Intake()
        scene.handler.intake = self.intake  # type: ignore[assignment]
        assert scene.client.welcome is not None
        scene.client.welcome.facts.media.append("image")

    def call(self, **more: Any) -> AsyncIterator[Any]:
        request = {"token_ids": [5, 7, 6], "multi_modal_data": {"image_url": [{"Url": "data:,"}]}, **more}
        return self.scene.handler.endpoint(request, self.scene.context)

    async def encoded(self) -> str:
        """The engine has made embeddings, and the worker has been asked."""
        (rid,) = await self.scene.submitted()
        self.scene.tokens(rid, meta=dict(ENCODED))
        await self.scene.bench.until(lambda: len(self.client.asked) == 1)
        return rid


def encode(directory: Path, test: Callable[[Encode], Awaitable[None]]) -> None:
    async def main(scene: Scene) -> None:
        assert scene.client.welcome is not None
        scene.client.welcome.facts.media.clear()
        await test(Encode(scene))

    run(directory, main, find("mm_encode"))


def test_the_worker_answers_and_the_engine_may_be_done_before(tmp_path: Path) -> None:
    async def test(made: Encode) -> None:
        chunks = asyncio.create_task(_all(made.call()))
        rid = await made.encoded()
        body, context = made.client.asked[0]
        assert json.loads(body)["request"]["token_ids"] == ENCODED["input_ids"] and context is made.scene.context
        assert made.intake.released
        made.scene.tokens(rid, finish={"type": "stop"})
        for chunk in (json.dumps({**CHUNK, "text": "", "finished": False}), LAST, None):
            made.client.said.put_nowait(chunk)
        assert await chunks == [CHUNK, LAST]
        assert made.scene.context.first == 1 and made.scene.handler.running == 0
        assert rid not in made.scene.bench.backend.aborted

    encode(tmp_path, test)


def test_the_engine_s_death_ends_it_at_once_while_the_embeddings_are_on_their_way(tmp_path: Path) -> None:
    async def test(made: Encode) -> None:
        chunks = asyncio.create_task(_all(made.call()))
        await made.encoded()
        made.scene.client.hear_death(Death(INCARNATION, "engine", 1, "killed", 0.0))
        with pytest.raises(EngineShutdown, match="killed"):
            await chunks
        await _turns(1)
        assert made.client.dropped == 1

    encode(tmp_path, test)


def test_after_the_first_chunk_the_engine_is_not_needed(tmp_path: Path) -> None:
    async def test(made: Encode) -> None:
        answer = made.call()
        first = asyncio.ensure_future(anext(answer))
        await made.encoded()
        made.client.said.put_nowait(CHUNK)
        assert await first == CHUNK
        made.scene.client.hear_death(Death(INCARNATION, "engine", 1, "killed", 0.0))
        made.client.said.put_nowait(LAST)
        made.client.said.put_nowait(None)
        assert await _all(answer) == [LAST]

    encode(tmp_path, test)


def test_embeddings_that_nobody_fetches_end_the_request(tmp_path: Path) -> None:
    async def test(made: Encode) -> None:
        chunks = asyncio.create_task(_all(made.call()))
        rid = await made.encoded()
        made.scene.bench.service.failed(rid, Code.PEER_DEAD, "not fetched")
        with pytest.raises(CannotConnect, match="not fetched"):
            await chunks

    encode(tmp_path, test)


@pytest.mark.parametrize("started", [False, True])
def test_a_dead_worker_is_migratable_and_its_embeddings_are_withdrawn(tmp_path: Path, started: bool) -> None:
    async def test(made: Encode) -> None:
        chunks = asyncio.create_task(_all(made.call()))
        rid = await made.encoded()
        if started:
            made.client.said.put_nowait(CHUNK)
        made.client.said.put_nowait(Exception("Unavailable: the engine died"))
        with pytest.raises(Disconnected if started else CannotConnect, match="the engine died"):
            await chunks
        await made.scene.bench.until(lambda: rid in made.scene.bench.backend.aborted)

    encode(tmp_path, test)


def test_an_answer_that_ends_too_soon_is_no_complete_one(tmp_path: Path) -> None:
    async def test(made: Encode) -> None:
        chunks = asyncio.create_task(_all(made.call()))
        await made.encoded()
        made.client.said.put_nowait(CHUNK)
        made.client.said.put_nowait(None)
        with pytest.raises(Disconnected, match="last chunk"):
            await chunks

    encode(tmp_path, test)


def test_a_client_that_goes_ends_all_of_it(tmp_path: Path) -> None:
    async def test(made: Encode) -> None:
        chunks = asyncio.create_task(_all(made.call()))
        rid = await made.encoded()
        made.scene.context.killed.set_result(True)
        await made.scene.bench.until(lambda: rid in made.scene.bench.backend.aborted)
        assert await chunks == []
        await _turns(1)
        assert made.client.dropped == 1

    encode(tmp_path, test)


def test_text_needs_no_engine_and_the_cut_of_a_drain_ends_it(tmp_path: Path) -> None:
    async def test(made: Encode) -> None:
        chunks = asyncio.create_task(_all(made.call(multi_modal_data=None)))
        await made.scene.bench.until(lambda: len(made.client.asked) == 1)
        assert not made.scene.bench.backend.submitted
        made.scene.handler.cut()
        with pytest.raises(EngineShutdown, match="stopping"):
            await chunks

    encode(tmp_path, test)


def test_an_encoder_s_canary_asks_nobody(tmp_path: Path) -> None:
    async def test(made: Encode) -> None:
        assert made.scene.client.welcome is not None
        request = find("mm_encode").canary_request(made.scene.client.welcome.facts)
        chunks = asyncio.create_task(_all(made.scene.handler.endpoint(request, made.scene.context)))
        (rid,) = await made.scene.submitted()
        made.scene.tokens(rid, finish={"type": "stop"})
        assert await chunks == [{"token_ids": [], "finish_reason": "stop"}] and not made.client.asked

    encode(tmp_path, test)


# --- a worker that is asked first ----------------------------------------------------------------------------------------


def decode(directory: Path, test: Callable[[Scene, Client], Awaitable[None]]) -> None:
    async def main(scene: Scene) -> None:
        client = Client()
        scene.context = Asked()
        scene.handler.callees = Callees("ns.prefill.generate", client)
        await test(scene, client)

    run(directory, main, find("mm_decode"))


def test_decode_goes_on_where_its_prefill_says_and_its_end_is_prefill_s(tmp_path: Path) -> None:
    async def test(scene: Scene, client: Client) -> None:
        chunks = asyncio.create_task(_all(scene.handler.endpoint(json.dumps(sent()), scene.context)))
        await scene.bench.until(lambda: len(client.asked) == 1)
        assert not scene.bench.backend.submitted
        client.said.put_nowait(json.dumps(WHERE))
        (rid,) = await scene.submitted()
        assert scene.bench.backend.submitted[rid]["bootstrap_room"] == 77
        client.said.put_nowait(None)
        scene.tokens(rid, 4, finish={"type": "length"})
        assert [chunk["token_ids"] for chunk in await chunks] == [[4]]

    decode(tmp_path, test)


def test_a_prefill_that_dies_before_the_first_token_ends_it(tmp_path: Path) -> None:
    async def test(scene: Scene, client: Client) -> None:
        chunks = asyncio.create_task(_all(scene.handler.endpoint(sent(), scene.context)))
        client.said.put_nowait(WHERE)
        (rid,) = await scene.submitted()
        client.said.put_nowait(Exception("Unavailable: killed"))
        with pytest.raises(CannotConnect, match="killed"):
            await chunks
        await scene.bench.until(lambda: rid in scene.bench.backend.aborted)

    decode(tmp_path, test)


def test_a_prefill_that_dies_afterwards_has_done_its_part(tmp_path: Path) -> None:
    async def test(scene: Scene, client: Client) -> None:
        answer = scene.handler.endpoint(sent(), scene.context)
        first = asyncio.ensure_future(anext(answer))
        client.said.put_nowait(WHERE)
        (rid,) = await scene.submitted()
        scene.tokens(rid, 4)
        assert (await first)["token_ids"] == [4]
        client.said.put_nowait(Exception("Unavailable: killed"))
        await _turns(1)
        scene.tokens(rid, 5, finish={"type": "length"})
        assert [chunk["token_ids"] for chunk in await _all(answer)] == [[5]]

    decode(tmp_path, test)


@pytest.mark.parametrize("said", [None, Exception("Unavailable: no instances")])
def test_without_a_prefill_nothing_is_submitted(tmp_path: Path, said: Exception | None) -> None:
    async def test(scene: Scene, client: Client) -> None:
        client.said.put_nowait(said)
        with pytest.raises(CannotConnect):
            await _all(scene.handler.endpoint(sent(), scene.context))
        assert not scene.bench.backend.submitted and scene.handler.running == 0

    decode(tmp_path, test)


def test_a_client_that_goes_while_prefill_is_asked(tmp_path: Path) -> None:
    async def test(scene: Scene, client: Client) -> None:
        chunks = asyncio.create_task(_all(scene.handler.endpoint(sent(), scene.context)))
        await scene.bench.until(lambda: len(client.asked) == 1)
        scene.context.killed.set_result(True)
        assert await chunks == []
        await _turns(1)
        assert client.dropped == 1 and not scene.bench.backend.submitted

    decode(tmp_path, test)


@pytest.mark.parametrize("sent_as", ["no JSON", "[1]", 5])
def test_what_is_no_request_is_the_caller_s_error(tmp_path: Path, sent_as: Any) -> None:
    async def test(scene: Scene, client: Client) -> None:
        with pytest.raises(InvalidArgument, match="expected an object"):
            await _all(scene.handler.endpoint(sent_as, scene.context))

    decode(tmp_path, test)


async def _all(chunks: AsyncIterator[Any]) -> list[Any]:
    return [chunk async for chunk in chunks]
