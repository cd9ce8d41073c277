"""Media as SGLang's arguments: places in the prompt, what can't be decoded, and images that take turns."""

import asyncio
import enum
import re
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from procs.engine.adapter import pixels
from procs.engine.adapter.media import kinds, settle, unreadable
from procs.engine.adapter.pixels import Turns
from shared.blobs import BLOBS
from shared.errors import Code, RequestError
from tests import media

START, END, PAD, VIDEO, SENTINEL, WORD = 5, 6, 7, 8, 9, 10
WORDS = {START: "<|vision_start|>", END: "<|vision_end|>", PAD: "<|image_pad|>", VIDEO: "<|video_pad|>", SENTINEL: "<image>"}
PLACE = [START, PAD, END]


class Modality(enum.Enum):
    """SGLang's, by name."""

    IMAGE = 1
    VIDEO = 2


class Tokens:
    """Stands for SGLang 0.5.23's MultimodalSpecialTokens with what Qwen2.5-VL's processor gives it."""

    image_token_id = PAD
    video_token_id = VIDEO
    audio_token_id = None
    image = re.compile(r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<image>")

    def get_combined_regex(self) -> re.Pattern[str]:
        return re.compile(f"((?:{self.image.pattern})|(?:{re.escape(WORDS[VIDEO])}))")

    def get_modality_of_token(self, text: str) -> Modality | None:
        return Modality.IMAGE if self.image.match(text) else Modality.VIDEO if text == WORDS[VIDEO] else None


class Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return "".join(self.convert_ids_to_tokens(token) for token in ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return WORDS.get(token, "x")


def manager(tokens: Any = None, *, multimodal: bool = True) -> Any:
    processor = SimpleNamespace(mm_tokens=tokens or Tokens(), _tokenizer=Tokenizer())
    return SimpleNamespace(mm_processor=processor, model_config=SimpleNamespace(is_multimodal=multimodal))


def settled(ids: list[int], *named: str, tokens: Any = None) -> dict[str, Any]:
    payload: dict[str, Any] = {"input_ids": ids}
    if named:
        payload |= {"media": list(named), BLOBS: [f"{kind}{place}".encode() for place, kind in enumerate(named)]}
    settle(payload, manager(tokens))
    assert "media" not in payload and BLOBS not in payload
    return payload


def test_a_kind_is_taken_that_has_a_placeholder_and_a_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"decord", "torchaudio"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in there else None)
    assert kinds(manager()) == ["image", "video"]
    assert kinds(manager(multimodal=False)) == []
    assert kinds(manager(SimpleNamespace())) == ["image", "video", "audio"], "a processor that doesn't say"
    there.clear()
    assert kinds(manager()) == ["image"]


def test_each_kind_is_an_argument() -> None:
    found = settled([WORD, *PLACE, WORD, VIDEO, *PLACE], "image", "image", "video")
    assert found["image_data"] == [b"image0", b"image1"] and found["video_data"] == [b"video2"] and "audio_data" not in found
    assert settled([WORD]) == {"input_ids": [WORD]}


@pytest.mark.parametrize(
    ("ids", "images"),
    [
        ([*PLACE, PAD], 1),
        ([PAD, *PLACE], 2),
        ([*PLACE, PAD], 2),
        ([PAD], 1),
        ([START, PAD], 1),
        ([START, PAD, PAD, END], 1),
        ([START, PAD, PAD, END], 2),
        ([*PLACE, SENTINEL], 1),
        ([*PLACE, *PLACE], 1),
        ([*PLACE], 2),
        ([*PLACE, VIDEO], 1),
        ([WORD], 1),
        ([PAD], 0),
        (PLACE, 0),
        ([VIDEO], 0),
    ],
)
def test_a_prompt_with_other_places_is_refused(ids: list[int], images: int) -> None:
    with pytest.raises(RequestError, match="the prompt has") as caught:
        settled(ids, *["image"] * images)
    assert caught.value.code == Code.INVALID


def test_what_another_model_uses_are_words_to_one_that_has_no_media() -> None:
    assert settled([SENTINEL, WORD])["input_ids"] == [SENTINEL, WORD]


def test_a_place_may_be_written_otherwise_than_by_its_token() -> None:
    """As Gemma 3 has it: the placeholder token comes with SGLang's expansion only."""
    tokens = Tokens()
    tokens.image_token_id = WORD + 1
    assert settled([SENTINEL], "image", tokens=tokens)["image_data"] == [b"image0"]


def test_a_processor_without_marks_is_left_to_itself() -> None:
    assert settled([WORD], "image", tokens=SimpleNamespace(image_token_id=None))["image_data"] == [b"image0"]


# --- what SGLang could not decode ----------------------------------------------------------------------------------------


def raised(outer: type[Exception], cause: Exception) -> BaseException:
    """As SGLang's processor does it (0.5.23, base_processor.py)."""
    try:
        try:
            raise ValueError(f"Error while loading data b'\\x89PNG': {cause}") from cause
        except ValueError as error:
            raise outer(f"An exception occurred while loading IMAGE data at index 1: {error}")  # noqa: B904 - as there
    except (ValueError, RuntimeError) as error:
        return error


@pytest.mark.parametrize("outer", [ValueError, RuntimeError])
def test_damage_is_the_client_s_and_said_without_the_file(outer: type[Exception]) -> None:
    assert unreadable(raised(outer, OSError("image file is truncated"))) == "image 2: damaged: image file is truncated"
    said = unreadable(raised(outer, OSError("cannot identify image file <_io.BytesIO object at 0x7f6c0846b060>")))
    assert said == "image 2: damaged: cannot identify image file"
    assert unreadable(raised(outer, EOFError())) == "image 2: damaged: EOFError"


def test_other_errors_are_not_damage() -> None:
    assert unreadable(raised(RuntimeError, MemoryError())) == ""
    assert unreadable(raised(RuntimeError, ImportError("no torchcodec"))) == ""
    assert unreadable(ValueError("the input is too long")) == ""


# --- turns ---------------------------------------------------------------------------------------------------------------


def test_pixels_of_a_header() -> None:
    assert [pixels.count(media.good(1, form)) for form in media.FORMATS] == [112 * 84] * 4
    assert pixels.count(media.png_bomb(1000)) == 10**6
    assert pixels.count(media.png_header(20_000, 20_000) + media.chunk(b"IDAT", b"")) == 400_000_000
    assert [pixels.count(thing) for thing in (b"", b"x", None, {"format": "processor_output"}, media.text_bomb())] == [0] * 5


def test_images_take_turns_and_the_first_is_first() -> None:
    async def test() -> None:
        turns, begun = Turns(10), []

        async def one(name: str, size: int, end: asyncio.Event) -> None:
            async with turns.share(size):
                begun.append(name)
                await end.wait()

        ends = {name: asyncio.Event() for name in "abcd"}
        sizes = {"a": 6, "b": 50, "c": 1, "d": 4}
        tasks = {name: asyncio.create_task(one(name, sizes[name], ends[name])) for name in ends}
        await until(lambda: begun == ["a"])
        ends["a"].set()
        await until(lambda: begun == ["a", "b"])  # more than all: alone
        tasks["b"].cancel()
        await until(lambda: begun == ["a", "b", "c", "d"])
        ends["c"].set()
        ends["d"].set()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        async with turns.share(10):
            pass

    asyncio.run(test())


def test_one_that_goes_while_it_waits_lets_the_next_have_its_turn() -> None:
    async def test() -> None:
        turns = Turns(10)
        async with turns.share(10):
            waiting = [asyncio.create_task(enter(turns)) for _ in range(2)]
            await asyncio.sleep(0)
            waiting[0].cancel()
        await waiting[1]

    asyncio.run(test())


async def enter(turns: Turns) -> None:
    async with turns.share(5):
        pass


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - of any kind
            await asyncio.sleep(0)


def test_the_processor_is_bounded_once() -> None:
    calls: list[Any] = []

    class Processor:
        async def process_mm_data_async(self, image_data: Any = None, **more: Any) -> str:
            calls.append((image_data, more))
            return "processed"

    found = SimpleNamespace(mm_processor=Processor())
    pixels.bound(found)
    bounded = found.mm_processor.process_mm_data_async
    pixels.bound(found)
    assert found.mm_processor.process_mm_data_async is bounded
    assert asyncio.run(bounded(image_data=[media.good(1)], input_text="x")) == "processed"
    assert asyncio.run(bounded(image_data=None)) == "processed"
    assert calls == [([media.good(1)], {"input_text": "x"}), (None, {})]


def test_the_loop_does_not_read_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(pixels, "count", lambda _: threads.append(threading.get_ident()) or 1)

    async def process(image_data: Any) -> None: ...

    found = SimpleNamespace(mm_processor=SimpleNamespace(process_mm_data_async=process))
    pixels.bound(found)
    asyncio.run(found.mm_processor.process_mm_data_async(image_data=[b"x"]))
    assert len(threads) == 1 and threads[0] != threading.get_ident()
