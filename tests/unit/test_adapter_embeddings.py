"""Embeddings between two engines over a file in shared memory: fetched, withdrawn, refused; those that are kept by content."""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from procs.engine.adapter import embeddings, encoder
from procs.engine.adapter.embedding_cache import Encoded, EncodedCache
from procs.engine.adapter.embeddings import Embeddings, LocalInbox, LocalOutbox, check, offered
from procs.engine.adapter.pixels import Turns
from procs.engine.adapter.requests import Requests
from procs.engine.adapter.shm import VARIABLE
from procs.engine.adapter.side_loop import SideLoop
from shared.errors import Code, RequestError
from shared.roles.mm_encode import picture
from tests import media

IMAGE, VIDEO = 7, 8
MARK = f"sgnode-test{os.getpid()}"
ROWS = torch.arange(24, dtype=torch.bfloat16).view(3, 8)
ITEM = {"image_grid_thw": [1, 2, 6], "video_grid_thw": None, "num_mm_tokens": 3}
IDS = [5, IMAGE, IMAGE, IMAGE, 6]


def manager(**vision: Any) -> Any:
    config = SimpleNamespace(vision_config=SimpleNamespace(**{"spatial_merge_size": 2, "out_hidden_size": 8, **vision}))
    tokens = SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO)
    model = SimpleNamespace(hf_config=config, hidden_size=8, dtype=torch.bfloat16)
    return SimpleNamespace(model_config=model, mm_processor=SimpleNamespace(mm_tokens=tokens))


def left() -> list[Path]:
    return list(Path("/dev/shm").glob(f"*{MARK}*"))


@pytest.fixture(autouse=True)
def mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, MARK)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await test()

    asyncio.run(main())
    assert not left()


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while True:
            if true():
                return
            await asyncio.sleep(0.001)


def encoded(transfer: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    return {"multimodal_inputs": [ITEM], "embeddings_shape": [3, 8], "transfer_payload": transfer, **more}


# --- one to another ------------------------------------------------------------------------------------------------------


def test_what_is_fetched_is_what_was_offered_and_the_offer_ends_by_it() -> None:
    async def test() -> None:
        async with offered(LocalOutbox(), ROWS) as (transfer, taken):
            assert len(left()) == 1
            waiting = asyncio.ensure_future(taken())
            found = await LocalInbox().fetch(transfer)
            await asyncio.wait_for(waiting, 5)
            assert torch.equal(found, ROWS) and found.dtype == ROWS.dtype

    run(test)


def test_an_offer_that_nobody_takes_ends_by_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "TAKEN_SECONDS", 0.05)

    async def test() -> None:
        with pytest.raises(RequestError) as caught:
            async with offered(LocalOutbox(), ROWS) as (_, taken):
                await taken()
        assert caught.value.code == Code.PEER_DEAD

    run(test)


def test_a_request_that_is_cancelled_while_its_offer_is_made_leaves_nothing() -> None:
    async def test() -> None:
        box = LocalOutbox()
        made = asyncio.Event()
        offer = box.offer

        async def slowly(tensor: Any) -> Any:
            found = await offer(tensor)
            await made.wait()
            return found

        box.offer = slowly  # type: ignore[method-assign, assignment]

        async def request() -> None:
            async with offered(box, ROWS):
                raise AssertionError("not reached")

        task = asyncio.ensure_future(request())
        await until(left)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        made.set()
        for _ in range(5):
            await asyncio.sleep(0)

    run(test)


def test_what_was_withdrawn_is_gone_for_its_receiver() -> None:
    async def test() -> None:
        async with offered(LocalOutbox(), ROWS) as (transfer, _):
            pass
        with pytest.raises(RequestError) as caught:
            await Embeddings(manager(), LocalInbox()).settle({"input_ids": IDS, "encoded": encoded(transfer)})
        assert caught.value.code == Code.PEER_DEAD

    run(test)


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "encoder_cache.a.b.safetensors",
        "/dev/shm/../etc/encoder_cache.a.b.safetensors",
        "/dev/shm//encoder_cache.a.b.safetensors",
        "/dev/shm/other.safetensors",
        "/tmp/encoder_cache.a.b.safetensors/x",
        "/tmp/encoder_cache.a.b.pt",
        None,
        5,
    ],
)
def test_only_an_encoder_s_file_is_opened(path: Any) -> None:
    with pytest.raises(RequestError) as caught:
        embeddings.check_file(path, 100)
    assert caught.value.code == Code.INVALID


def test_a_link_is_no_encoder_s_file_and_neither_is_one_that_is_too_large(tmp_path: Path) -> None:
    link = Path("/dev/shm") / f"encoder_cache.{MARK}.link.safetensors"
    link.symlink_to(tmp_path)
    large = Path("/dev/shm") / f"encoder_cache.{MARK}.large.safetensors"
    large.write_bytes(bytes(1 << 17))
    try:
        for path in (link, large):
            with pytest.raises(RequestError) as caught:
                embeddings.check_file(str(path), 100)
            assert caught.value.code == Code.INVALID
    finally:
        link.unlink()
        large.unlink()


# --- what becomes of it --------------------------------------------------------------------------------------------------


def test_they_become_sglang_s_item_in_the_model_s_own_type() -> None:
    async def test() -> None:
        async with offered(LocalOutbox(), ROWS) as (transfer, _):
            payload: dict[str, Any] = {"input_ids": IDS, "encoded": encoded(transfer)}
            await Embeddings(manager(), LocalInbox()).settle(payload)
        (item,) = payload.pop("image_data")
        assert torch.equal(item["precomputed_embeddings"], ROWS) and item["precomputed_embeddings"].dtype == torch.bfloat16
        assert item["image_grid_thw"].tolist() == [[1, 2, 6]] and item["format"] == "processor_output"
        assert payload == {"input_ids": IDS}

    run(test)


def test_decode_gets_places_without_embeddings() -> None:
    async def test() -> None:
        payload: dict[str, Any] = {"input_ids": IDS, "encoded": encoded(None), "bootstrap_room": 7}
        await Embeddings(manager(), None).settle(payload)
        (item,) = payload["image_data"]
        assert "precomputed_embeddings" not in item and item["hash"] == 14 and item["image_grid_thw"].tolist() == [[1, 2, 6]]

    run(test)


def test_samples_of_one_request_fetch_once() -> None:
    async def test() -> None:
        room = Embeddings(manager(), LocalInbox())
        async with offered(LocalOutbox(), ROWS) as (transfer, _):
            payloads: list[dict[str, Any]] = [{"input_ids": IDS, "encoded": encoded(transfer, samples=3)} for _ in range(3)]
            await asyncio.gather(*(room.settle(payload) for payload in payloads))
        assert all(torch.equal(payload["image_data"][0]["precomputed_embeddings"], ROWS) for payload in payloads)
        assert not room._shared

    run(test)


def test_what_comes_otherwise_than_it_was_said_is_refused() -> None:
    async def test() -> None:
        async with offered(LocalOutbox(), ROWS.clone().view(4, 6)) as (transfer, _):
            transfer["embeddings_shape"] = [3, 8]
            with pytest.raises(RequestError) as caught:
                await Embeddings(manager(), LocalInbox()).settle({"input_ids": IDS, "encoded": encoded(transfer)})
        assert caught.value.code == Code.INVALID

    run(test)


def test_embeddings_that_do_not_come_are_the_encoder_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "RECEIVE_SECONDS", 0.02)

    class Never:
        async def fetch(self, transfer: dict[str, Any]) -> Any:
            await asyncio.Event().wait()

    async def test() -> None:
        transfer = {"embeddings_shape": [3, 8], "embedding_dtype_str": "bfloat16", "serialized_request": None}
        with pytest.raises(RequestError) as caught:
            await Embeddings(manager(), Never()).settle({"input_ids": IDS, "encoded": encoded(transfer)})
        assert caught.value.code == Code.PEER_DEAD

    run(test)


@pytest.mark.parametrize(
    ("change", "ids", "width", "words"),
    [
        ({}, [5, IMAGE, IMAGE, 6], 8, "2 placeholders of type image for 3"),
        ({}, [5, *[IMAGE] * 4, 6], 8, "4 placeholders"),
        ({}, [*IDS, VIDEO], 8, "1 placeholders of type video for 0"),
        ({}, IDS, 16, "16 numbers a token, the model has 8"),
        ({"image_grid_thw": [1, 2, 4]}, IDS, 8, "8 patches of type image are not 3 tokens"),
    ],
)
def test_items_that_do_not_fit_prompt_and_model_are_refused(change: Any, ids: list[int], width: int, words: str) -> None:
    check([ITEM], IDS, manager(), 8)
    with pytest.raises(RequestError) as caught:
        check([{**ITEM, **change}], ids, manager(), width)
    assert caught.value.code == Code.INVALID and words in caught.value.message


def test_a_tower_with_more_layers_of_embeddings_has_wider_ones() -> None:
    check([ITEM], IDS, manager(deepstack_visual_indexes=[1, 2, 3]), 32)


# --- the encoder's part --------------------------------------------------------------------------------------------------


def test_each_placeholder_becomes_as_many_as_its_item_has_rows() -> None:
    items = [(IMAGE, 2), (IMAGE, 3), (VIDEO, 1)]
    assert encoder.expand([5, IMAGE, VIDEO, 6, IMAGE], items) == [5, IMAGE, IMAGE, VIDEO, 6, IMAGE, IMAGE, IMAGE]
    for ids, kinds in (([5], ["image"]), ([IMAGE], []), ([VIDEO, IMAGE], ["image", "image"])):
        with pytest.raises(RequestError, match="placeholders"):
            encoder.check(ids, kinds, {"image": IMAGE, "video": VIDEO})
    with pytest.raises(RequestError, match="takes no video"):
        encoder.check([VIDEO], ["video"], {"image": IMAGE})


def test_a_long_encode_is_a_step_that_a_prober_sees() -> None:
    progress = encoder.Progress()
    assert progress.numbers()["scheduler_step_seconds_dp0"] == 0
    progress.begin()
    progress.since -= 30
    assert progress.numbers()["scheduler_step_seconds_dp0"] >= 30 and progress.numbers()["running_dp0"] == 1
    progress.begin()
    progress.end()  # one of two has ended: it goes on
    found = progress.numbers()
    assert found["scheduler_step_seconds_dp0"] < 10 and (found["scheduler_steps_dp0"], found["running_dp0"]) == (1, 1)


class Tower:
    def __init__(self) -> None:
        self.encoded: list[bytes] = []
        self.open = asyncio.Event()
        self.open.set()

    async def encode(self, kind: str, content: bytes) -> Encoded:
        self.encoded.append(content)
        await self.open.wait()
        if content == b"bad":
            raise RequestError(Code.INVALID, "bad")
        return Encoded(torch.full((2, 4), float(len(content))), [1, 2, 4])


def test_what_was_encoded_is_kept_by_content_until_others_need_the_room() -> None:
    async def test() -> None:
        tower = Tower()
        cache = EncodedCache(64, tower.encode)  # two entries of 32 bytes
        first = await cache.get("image", b"a")
        assert await cache.get("image", b"a") == first and tower.encoded == [b"a"]
        assert cache.numbers()["embedding_cache_hits"] == 1
        for content in (b"bb", b"ccc", b"a"):
            await cache.get("image", content)
        assert tower.encoded == [b"a", b"bb", b"ccc", b"a"]
        assert cache.numbers()["embedding_cache_current_bytes"] == 64

    run(test)


def test_the_same_content_at_once_is_encoded_once_also_when_the_first_is_cancelled() -> None:
    async def test() -> None:
        tower = Tower()
        tower.open.clear()
        cache = EncodedCache(1024, tower.encode)
        asked = [asyncio.ensure_future(cache.get("image", b"a")) for _ in range(3)]
        await asyncio.sleep(0)
        asked[0].cancel()
        tower.open.set()
        assert (await asked[1]).rows == (await asked[2]).rows == 2 and tower.encoded == [b"a"]

    run(test)


def test_a_failure_is_not_kept() -> None:
    async def test() -> None:
        cache = EncodedCache(1024, Tower().encode)
        for _ in range(2):
            with pytest.raises(RequestError):
                await cache.get("image", b"bad")

    run(test)


class Sink:
    def __init__(self) -> None:
        self.said: list[Any] = []

    def output(self, rid: str, token_ids: list[int], finish: Any, meta: Any, text: str | None = None) -> None:
        self.said.append((finish, meta))

    def failed(self, rid: str, code: Code, message: str) -> None:
        self.said.append(code)


def backend(tower: Tower) -> tuple[Any, Sink]:
    made: Any = encoder.EncodeBackend.__new__(encoder.EncodeBackend)
    sink = Sink()
    made._sink, made._requests, made._box = sink, Requests(), LocalOutbox()
    made._placeholders = {"image": IMAGE}
    made._encode, made._cache = tower.encode, EncodedCache(0, tower.encode)
    return made, sink


def test_a_request_lasts_until_its_embeddings_were_fetched() -> None:
    async def test() -> None:
        made, sink = backend(Tower())
        made.submit("r", {"input_ids": [5, IMAGE, 6], "media": ["image"], "blobs": [b"abc"]})
        await until(lambda: sink.said)
        finish, meta = sink.said[0]
        assert finish is None and meta["input_ids"] == [5, IMAGE, IMAGE, 6] and len(left()) == 1
        assert meta["encoded"]["multimodal_inputs"] == [{"image_grid_thw": [1, 2, 4], "num_mm_tokens": 2}]
        found = await LocalInbox().fetch(meta["encoded"]["transfer_payload"])
        assert torch.equal(found, torch.full((2, 4), 3.0))
        await until(lambda: not made._requests.tasks)
        assert sink.said[1:] == [({"type": "stop"}, None)]

    run(test)


def test_an_abort_withdraws_them() -> None:
    async def test() -> None:
        made, sink = backend(Tower())
        made.submit("r", {"input_ids": [IMAGE], "media": ["image"], "blobs": [b"abc"]})
        await until(left)
        made.abort("r")
        await until(lambda: not made._requests.tasks)
        assert sink.said[-1][0]["type"] == "abort"

    run(test)


def test_the_first_item_that_fails_ends_its_siblings() -> None:
    ended: list[bytes] = []

    class Slow(Tower):
        async def encode(self, kind: str, content: bytes) -> Encoded:
            if content == b"bad":
                return await super().encode(kind, content)
            try:
                return await asyncio.Event().wait()  # type: ignore[return-value]
            finally:
                ended.append(content)

    async def test() -> None:
        made, sink = backend(Slow())
        contents = [b"a", b"bad", b"b"]
        made.submit("r", {"input_ids": [IMAGE] * 3, "media": ["image"] * 3, "blobs": contents})
        await until(lambda: not made._requests.tasks)
        assert sink.said == [Code.INVALID] and ended == [b"a", b"b"]

    run(test)


def test_images_take_turns_by_their_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six pictures of 9,408 pixels with room for two; a video's are not known before it is decoded."""
    begun: list[bytes] = []
    go = asyncio.Event()

    async def encode(_: Any, kind: str, content: bytes) -> Encoded:
        begun.append(content)
        await go.wait()
        return Encoded(torch.zeros(2, 4), [1, 2, 4])

    class Here:
        async def call(self, work: Awaitable[Encoded]) -> Encoded:
            return await work

    monkeypatch.setattr(encoder, "encode", encode)

    async def test() -> None:
        made: Any = encoder.EncodeBackend.__new__(encoder.EncodeBackend)
        made._encoder, made._tower, made._progress, made._turns = None, Here(), encoder.Progress(), Turns(20_000)
        pictures = [media.good(seed) for seed in range(6)]
        tasks = [asyncio.ensure_future(made._encode("image", picture)) for picture in pictures]
        await until(lambda: made._turns._turn.locked() and len(begun) == 2)
        assert made._progress.running == 2
        tasks.append(asyncio.ensure_future(made._encode("video", b"film")))
        go.set()
        await asyncio.gather(*tasks)
        assert len(begun) == 7 and made._turns._taken == 0

    run(test)


def test_a_canary_ends_with_its_picture_and_a_bad_file_with_its_own_error() -> None:
    async def test() -> None:
        made, sink = backend(Tower())
        made.submit("r", {"input_ids": [], "media": ["image"], "blobs": [picture()], "keep": True})
        made.submit("s", {"input_ids": [IMAGE], "media": ["image"], "blobs": [b"bad"]})
        await until(lambda: not made._requests.tasks)
        assert sorted(map(str, sink.said)) == sorted(map(str, [({"type": "stop"}, None), Code.INVALID]))

    run(test)


def test_a_canary_goes_through_the_tower_also_when_its_picture_is_kept() -> None:
    async def test() -> None:
        tower = Tower()
        made, sink = backend(tower)
        made._cache = EncodedCache(1024, tower.encode)
        for rid in ("first", "second"):
            made.submit(rid, {"input_ids": [], "media": ["image"], "blobs": [picture()], "keep": True})
            await until(lambda: not made._requests.tasks)
        await made._cache.get("image", picture())
        tower.open.clear()
        made.submit("hung", {"input_ids": [], "media": ["image"], "blobs": [picture()], "keep": True})
        await until(lambda: len(tower.encoded) == 4)
        assert len(sink.said) == 2
        tower.open.set()
        await until(lambda: not made._requests.tasks)
        assert len(sink.said) == 3

    run(test)


@pytest.mark.parametrize("holds_its_loop", [True, False])
def test_requests_that_are_aborted_before_a_hung_tower_are_no_steps(
    monkeypatch: pytest.MonkeyPatch, holds_its_loop: bool
) -> None:
    begun, go = threading.Event(), threading.Event()

    async def encode(_: Any, kind: str, content: bytes) -> Encoded:
        begun.set()
        if holds_its_loop:
            go.wait()
        else:
            await asyncio.Event().wait()
        return Encoded(torch.zeros(2, 4), [1, 2, 4])

    monkeypatch.setattr(encoder, "encode", encode)

    async def test() -> None:
        made, sink = backend(Tower())
        made._encoder, made._tower, made._progress, made._turns = None, SideLoop("test"), encoder.Progress(), Turns()
        del made._encode  # its own
        made._cache = EncodedCache(0, made._encode)
        try:
            for rid in ("a", "b", "c"):
                made.submit(rid, {"input_ids": [IMAGE], "media": ["image"], "blobs": [media.good(1)]})
            await until(begun.is_set)
            for rid in ("a", "b", "c"):
                made.abort(rid)
            await until(lambda: not made._requests.tasks)
            assert [finish["type"] for finish, _ in sink.said] == ["abort"] * 3
            if holds_its_loop:
                found = made._progress.numbers()
                assert (found["scheduler_steps_dp0"], found["running_dp0"]) == (0, 1)
                assert found["scheduler_step_seconds_dp0"] > 0
                go.set()
            await until(lambda: not made._progress.running)
            assert bool(made._progress.steps) == holds_its_loop, "what the tower has made after all, though for nobody"
        finally:
            go.set()
            made._tower.close()

    run(test)
