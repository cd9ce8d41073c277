"""Media as an agent takes them in: what is good comes out as bytes, what is hostile costs one error, little memory, no wait."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from procs.agent import images
from procs.agent.images import look
from procs.agent.media import LARGE_IMAGES, Intake
from shared.config import MediaLimits
from shared.errors import Code, RequestError
from shared.roles.role import Media
from tests import media
from tests.harness import wait_for
from tests.media import Hostile, Origin

BOUND = 1 << 20
"""Of a data: URL and of a file, here."""
GROWTH_MB = 200
"""What all of the corpus may take at its peak: its bomb alone would be 300, decoded."""


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with Origin() as made:
        yield made


@pytest.fixture
def allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Internal addresses and the files in this directory may be read."""
    monkeypatch.setenv("DYN_MM_ALLOW_INTERNAL", "1")
    monkeypatch.setenv("DYN_MM_LOCAL_PATH", str(tmp_path / "allowed"))
    monkeypatch.setenv("DYN_MM_MAX_DATA_URL_MB", "1")
    monkeypatch.setenv("DYN_MM_MAX_FILE_SIZE_MB", "1")
    (tmp_path / "allowed").mkdir()
    return tmp_path / "allowed"


def run(test: Callable[[Intake], Awaitable[None]], **limits: Any) -> None:
    async def main() -> None:
        intake = Intake(MediaLimits(**limits))
        try:
            await asyncio.wait_for(test(intake), 120)
            assert intake.held == 0
        finally:
            await _close()

    # Importing SGLang, as other tests do, makes uvloop's loops the usual ones, which have a resolver of their own.
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(main())


async def _close() -> None:
    """Dynamo's client is the process's; here each loop has its own."""
    from dynamo.common import http

    if http._default is not None:
        await http._default.close()
        http._default = None


async def refusal(intake: Intake, *references: Any, **data: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await intake.gather({"image_url": list(references), **data})
    assert intake.held == 0
    assert caught.value.message.isprintable() and len(caught.value.message) < 500, caught.value.message
    return caught.value


async def taken(intake: Intake, *references: Any) -> list[bytes]:
    found = await intake.gather({"image_url": list(references)})
    contents = list(found.blobs)
    intake.release(found)
    return contents


# --- good ones -----------------------------------------------------------------------------------------------------------


def test_every_way_gives_the_file_as_it_is(origin: Origin, allowed: Path) -> None:
    async def test(intake: Intake) -> None:
        picture = media.good(1)
        (allowed / "ä b.png").write_bytes(picture)
        escaped = media.url(picture).replace("+", "%2B").replace("/", "%2F").replace("=", "%3d")
        ways: list[Any] = [media.url(picture), escaped.replace("image%2Fpng", "image/png"), (allowed / "ä b.png").as_uri()]
        ways += [origin.url + "/good", origin.redirect("/once", "/good"), {"Url": origin.url + "/good"}]
        assert await taken(intake, *ways) == [picture] * len(ways)

    run(test)


def test_kinds_come_in_the_engine_s_order_and_of_each_as_in_the_messages() -> None:
    async def test(intake: Intake) -> None:
        pictures = [media.good(seed, form) for seed, form in enumerate(media.FORMATS)]
        data = {
            "audio_url": [{"Url": media.url(b"sound", "audio/wav")}],
            "image_url": [{"Url": media.url(picture)} for picture in pictures],
            "video_url": [{"Url": media.url(b"film", "video/mp4")}],
        }
        found = await intake.gather(data)
        assert found.kinds == ["image"] * 4 + ["video", "audio"]
        assert found.blobs == [*pictures, b"film", b"sound"]
        assert found.held >= sum(map(len, found.blobs)) and intake.held == found.held
        assert [len(items) for items in data.values()] == [1, 4, 1], "they still say that there are media"
        assert not any(any(items) for items in data.values()), "what they referred to is held once"
        intake.release(found)
        intake.release(found)

    run(test)


# --- hostile ones --------------------------------------------------------------------------------------------------------


def corpus(origin: Origin, allowed: Path) -> list[Hostile]:
    return [
        *media.damaged(), *media.no_images(), *media.data_urls(BOUND), *media.files(allowed), *media.urls(), *media.things(),
        *media.fetched(origin, allowed),
    ]  # fmt: skip


def test_each_of_the_corpus_costs_one_error_and_little_memory(origin: Origin, allowed: Path) -> None:
    cases = corpus(origin, allowed)
    assert len(cases) >= 60 and len({case.name for case in cases}) == len(cases)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins here

    async def test(intake: Intake) -> None:
        before = memory("VmRSS")
        for case in cases:
            try:
                await taken(intake, *case.references)
            except RequestError as error:
                assert error.code == Code.INVALID, (case.name, error.message)
                assert error.message.startswith(("image 1: ", "image 2: ")), (case.name, error.message)
                assert error.message.isprintable() and len(error.message) < 500, (case.name, error.message)
            else:
                assert case.passes, case.name
            assert intake.held == 0, case.name
            assert await taken(intake, media.url(media.good(2))) == [media.good(2)], f"a good one after {case.name}"
        print(f"{len(cases)} cases: {before} MB before, {memory('VmHWM')} MB at the peak")
        assert memory("VmHWM") - before < GROWTH_MB

    run(test)


def memory(name: str) -> int:
    """MB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) >> 10


@pytest.mark.parametrize("url", media.internal())
def test_internal_addresses_are_not_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYN_MM_ALLOW_INTERNAL", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", answering("127.0.0.1"))  # as the system's resolver reads these numbers

    async def test(intake: Intake) -> None:
        assert (await refusal(intake, url)).code == Code.INVALID

    run(test)


def answering(*addresses: str) -> Callable[..., Any]:
    """A resolver with one address after another, then always the last."""
    left = list(addresses)

    def resolve(_host: str, port: Any, *_: Any, **__: Any) -> list[Any]:
        address = left.pop(0) if len(left) > 1 else left[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, int(port or 0)))]

    return resolve


def test_a_name_that_means_loopback_is_not_asked_also_when_it_changes(origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYN_MM_ALLOW_INTERNAL", raising=False)
    asked = len(origin.asked)

    async def test(intake: Intake) -> None:
        for addresses in (("127.0.0.1",), ("1.1.1.1", "127.0.0.1")):
            monkeypatch.setattr(socket, "getaddrinfo", answering(*addresses))
            error = await refusal(intake, f"https://pictures.example:{origin.port}/good")
            assert "block" in error.message, error.message

    run(test)
    assert len(origin.asked) == asked


@pytest.mark.parametrize("to", ["https://127.0.0.1/", "https://name.example/", "http://1.1.1.1/", "file:///etc/passwd"])
def test_a_redirect_is_judged_as_the_url_was(to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dynamo.common.http import AiohttpClient

    monkeypatch.delenv("DYN_MM_ALLOW_INTERNAL", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", answering("1.1.1.1", "127.0.0.1"))
    asked: list[str] = []

    async def redirect(_: Any, url: str, *rest: Any, **options: Any) -> tuple[None, str]:
        asked.append(url)
        return None, to

    monkeypatch.setattr(AiohttpClient, "_fetch_body_or_redirect", redirect)

    async def test(intake: Intake) -> None:
        assert (await refusal(intake, "https://pictures.example/a.png")).code == Code.INVALID

    run(test)
    assert asked == ["https://pictures.example/a.png"]


def test_only_the_allowed_domains_are_asked_at_each_hop(origin: Origin, allowed: Path) -> None:
    there = f"http://localhost:{origin.port}"

    async def test(intake: Intake) -> None:
        assert await taken(intake, origin.url + "/good") == [media.good(1)]
        asked = len(origin.asked)
        for hop in (f"{there}/good", f"http://127.0.0.1.example@localhost:{origin.port}/good"):
            assert "--allowed-media-domains" in (await refusal(intake, hop)).message
        assert len(origin.asked) == asked
        assert "--allowed-media-domains" in (await refusal(intake, origin.redirect("/away", f"{there}/good"))).message
        assert origin.asked[asked:] == ["/away"]

    run(test, domains=["127.0.0.1"])


def test_an_operator_s_proxy_is_no_client_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("DYN_MM_ALLOW_INTERNAL", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", answering("1.1.1.1"))

    async def test(intake: Intake) -> None:
        error = await refusal(intake, "https://pictures.example/a.png")
        assert error.code == Code.INTERNAL and "DYN_MM_TRUST_EGRESS_PROXY" in error.message

    run(test)


# --- bounds --------------------------------------------------------------------------------------------------------------


def test_items_are_counted_before_any_is_fetched(origin: Origin, allowed: Path) -> None:
    asked = len(origin.asked)

    async def test(intake: Intake) -> None:
        many = [origin.url + "/good"] * 10_000
        assert (await refusal(intake, *many)).message == "10000 images, videos and audio clips: 2 at most"
        assert (await refusal(intake, *many[:1], video_url=many[:1])).message == "1 items of type video: 0 at most"

    run(test, max_items=2, per_kind={"video": 0})
    assert len(origin.asked) == asked


@pytest.mark.parametrize(
    "data",
    [[], 5, "x", {"image_url": 5}, {"image_url": {"Url": "x"}}, {"text_url": ["x"]}, {"image_url": [], 5: ["x"], "a": ["x"]}],
    ids=str,
)
def test_media_of_another_form_are_refused(data: Any) -> None:
    async def test(intake: Intake) -> None:
        with pytest.raises(RequestError, match="multi_modal_data") as caught:
            await intake.gather(data)
        assert caught.value.code == Code.INVALID

    run(test)


def test_a_request_s_pixels_are_bounded_one_by_one_and_together() -> None:
    side = 100

    async def test(intake: Intake) -> None:
        full = media.url(media.png_bomb(side))
        assert len(await taken(intake, *[full] * LARGE_IMAGES)) == LARGE_IMAGES
        assert "50000 pixels together, 40000 at most" in (await refusal(intake, *[full] * (LARGE_IMAGES + 1))).message
        assert "image 2: 101 x 101 pixels" in (await refusal(intake, full, media.url(media.png_bomb(side + 1)))).message

    run(test, max_pixels=side * side)


def test_scans_are_counted_in_the_image_not_behind_it() -> None:
    assert images.scans(media.scan_bomb(64, 1)) == 6
    assert images.scans(media.scan_bomb(64, 40)) == 45
    look(media.scan_bomb(64, 1) + images.SCAN * 1000, 10_000)
    with pytest.raises(RequestError, match="505 scans"):
        look(media.scan_bomb(64, 500), 10_000)


@pytest.mark.parametrize("form", media.LONG)
def test_a_header_is_read_as_far_as_common_ones_go(form: str) -> None:
    assert look(media.long_header(form, 3000), 10_000) == 64 * 64
    with pytest.raises(RequestError, match=r"a header of more than 1 MB|more than 10000 chunks") as caught:
        look(media.long_header(form, 2 << 20), 10_000)
    assert caught.value.code == Code.INVALID


def test_large_comments_are_taken_and_so_is_a_header_that_needs_few_reads() -> None:
    picture = media.picture(1)
    assert look(media.saved(picture, "JPEG", comment=bytes(60_000), icc_profile=bytes(900_000)), 10_000) == 112 * 84
    whole = media.good(1)
    place = whole.index(b"IEND") - 4
    assert look(whole[:place] + media.chunk(b"prVt", bytes(1_000_000)) + whole[place:], 10_000) == 112 * 84
    with pytest.raises(RequestError, match="a header of more than 1 MB"):
        look(whole[:place] + media.chunk(b"prVt", bytes(600_000)) * 2 + whole[place:], 10_000)


def test_a_colour_profile_is_unpacked_but_not_hundreds() -> None:
    assert look(media.profile_bomb(1), 10_000) == 64 * 64
    with pytest.raises(RequestError, match="more than 10 colour profiles"):
        look(media.profile_bomb(900), 10_000)


def test_the_operator_s_bound_is_the_only_one_of_pixels() -> None:
    header = media.png_header(20_000, 20_000) + media.chunk(b"IDAT", b"")
    assert look(header, 400_000_000) == 400_000_000
    with pytest.raises(RequestError, match="20000 x 20000 pixels, 399999999 in all at most"):
        look(header, 399_999_999)


def test_scans_are_counted_also_where_others_are_said_to_be_behind_it() -> None:
    from PIL import Image

    picture = Image.new("L", (64, 64), 128)
    whole = media.saved(picture, "MPO", save_all=True, append_images=[picture], progressive=True)
    assert look(whole, 10_000) == 64 * 64
    end = whole.index(images.END)
    scan = whole.rindex(images.SCAN, 0, end)
    with pytest.raises(RequestError, match="scans"):
        look(whole[:scan] + whole[scan:end] * 500 + whole[end:], 10_000)


def test_what_waits_for_the_engine_is_bounded(origin: Origin, allowed: Path) -> None:
    picture = media.noise(600_000)
    origin.answers["/large"] = (200, {}, picture)

    async def test(intake: Intake) -> None:
        for way in (media.url(picture), origin.url + "/large"):
            first = await intake.gather({"image_url": [way]})
            error = await refusal_beside(intake, way)
            assert error.code == Code.OVERLOADED and "wait for the engine" in error.message
            intake.release(first)
            assert (await refusal(intake, way, way)).code == Code.INVALID, "no other worker would take it either"
            assert await taken(intake, way) == [picture]

    run(test, memory_bytes=1_000_000)


async def refusal_beside(intake: Intake, url: str) -> RequestError:
    held = intake.held
    with pytest.raises(RequestError) as caught:
        await intake.gather({"image_url": [url]})
    assert intake.held == held, "what the others hold"
    return caught.value


def test_an_endless_body_is_cut_at_its_bound_while_it_comes(origin: Origin, allowed: Path) -> None:
    async def test(intake: Intake) -> None:
        assert "download limit" in (await refusal(intake, origin.url + "/drip")).message
        await asyncio.to_thread(wait_for, "the origin is left", lambda: "/drip" in origin.left)

    run(test)


def test_an_origin_that_never_answers_is_left_and_so_it_is_when_the_client_goes(origin: Origin, allowed: Path) -> None:
    async def test(intake: Intake) -> None:
        origin.left.clear()
        assert "no answer within 0.2 s" in (await refusal(intake, origin.url + "/never")).message
        await asyncio.to_thread(wait_for, "the origin is left", lambda: len(origin.left) == 1)

    async def cancelled(intake: Intake) -> None:
        asked = len(origin.asked)
        gathering: asyncio.Task[Media] = asyncio.create_task(
            intake.gather({"image_url": [media.url(media.good(1)), origin.url + "/never"]})
        )
        await asyncio.to_thread(wait_for, "the origin is asked", lambda: len(origin.asked) > asked)
        assert intake.held > 0
        gathering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gathering
        assert intake.held == 0
        await asyncio.to_thread(wait_for, "the origin is left", lambda: len(origin.left) == 2)

    run(test, timeout=0.2)
    run(cancelled)
