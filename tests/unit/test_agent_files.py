"""Generated files in an agent: stored or in the answer, nothing left of what nobody gets, one clear error where a store fails."""

import asyncio
import base64
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from dynamo.llm.exceptions import EngineShutdown, HttpError, InvalidArgument

from procs.agent import output_store
from procs.agent.files import IN_PASSING, FileHandler
from procs.agent.media import Intake
from procs.agent.output_store import OutputStore, StoreError
from shared.blobs import BLOBS
from shared.config import MediaLimits
from shared.engine_client import EngineClient
from shared.errors import Code
from shared.frames import Beat
from shared.roles import find
from tests.unit.test_agent_handler import Context
from tests.unit.test_service import INCARNATION, Bench, bench_at

REQUEST = {"prompt": "p", "model": "m", "size": "64x64", "nvext": {"seed": 1}}
STOP = {"type": "stop"}


# --- the store -----------------------------------------------------------------------------------------------------------


def put(store: OutputStore, path: str, content: bytes) -> str:
    return asyncio.run(store.put(path, content))


def test_a_file_is_where_its_url_says_and_anybody_may_read_it(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        url = put(OutputStore(f"file://{tmp_path}/media", None), "users/a/x.png", b"png")
    finally:
        os.umask(old)
    path = tmp_path / "media/users/a/x.png"
    assert url == f"file://{path}" and path.read_bytes() == b"png" and path.stat().st_mode & 0o777 == 0o644
    assert all(folder.stat().st_mode & 0o555 == 0o555 for folder in list(path.parents)[:3])
    assert tmp_path.stat().st_mode & 0o777 == 0o700, "above the store nothing is touched"


def test_a_folder_that_was_there_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "media/users").mkdir(parents=True)
    for folder in (tmp_path / "media", tmp_path / "media/users"):
        folder.chmod(0o700)
    old = os.umask(0o077)
    try:
        put(OutputStore(f"file://{tmp_path}/media", None), "users/a/b/x.png", b"png")
    finally:
        os.umask(old)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("media", "media/users", "media/users/a", "media/users/a/b")]
    assert modes == [0o700, 0o700, 0o755, 0o755]


def test_a_removed_file_leaves_no_empty_folder_below_the_root(tmp_path: Path) -> None:
    store = OutputStore(f"file://{tmp_path}/media", None)
    for path in ("users/a/x.png", "users/b/y.png"):
        put(store, path, b"png")
    store._remove(["users/a/x.png"])
    assert [path.name for path in (tmp_path / "media/users").iterdir()] == ["b"]
    store._remove(["users/b/y.png"])
    assert (tmp_path / "media").is_dir() and not list((tmp_path / "media").iterdir())


def test_what_is_stored_for_nobody_is_removed_after_the_close_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, began, hold, removed = OutputStore(f"file://{tmp_path}", None), threading.Event(), threading.Event(), threading.Event()
    put(store, "first.png", b"png")
    pipe, remove = store._fs.pipe, store._remove

    def slow(path: str, content: bytes) -> None:
        began.set()
        assert hold.wait(20)
        pipe(path, content)

    def watched(paths: list[str]) -> None:
        assert (tmp_path / paths[0]).exists()
        remove(paths)
        removed.set()

    monkeypatch.setattr(store._fs, "pipe", slow)
    monkeypatch.setattr(store, "_remove", watched)

    async def main() -> None:
        putting = asyncio.create_task(store.put("a/late.png", b"png"))
        assert await asyncio.to_thread(began.wait, 20)
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting
        store.close()

    asyncio.run(main())
    hold.set()  # the event loop is gone by now
    assert removed.wait(20) and [path.name for path in tmp_path.iterdir()] == ["first.png"]
    with pytest.raises(StoreError, match="stopping"):
        put(store, "x.png", b"png")


def test_a_file_may_be_discarded_after_the_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, removed = OutputStore(f"file://{tmp_path}", None), threading.Event()
    put(store, "a/x.png", b"png")
    remove = store._remove

    def watched(paths: list[str]) -> None:
        remove(paths)
        removed.set()

    monkeypatch.setattr(store, "_remove", watched)
    store.close()
    store.discard(["a/x.png"])
    assert removed.wait(20) and not list(tmp_path.iterdir())


def test_the_public_url_goes_before_the_place(tmp_path: Path) -> None:
    assert put(OutputStore(f"file://{tmp_path}", "https://x.example/media/"), "a.mp4", b"") == "https://x.example/media/a.mp4"


def test_another_of_fsspecs_stores_is_written_to_as_well() -> None:
    store = OutputStore("memory://media", None)
    assert put(store, "a/b.png", b"png") == "memory:///media/a/b.png" and store._fs.cat("a/b.png") == b"png"


def test_a_store_that_fails_is_one_line_without_a_place_of_this_host(tmp_path: Path) -> None:
    (tmp_path / "users").touch()
    with pytest.raises(StoreError, match="could not be stored") as caught:
        put(OutputStore(f"file://{tmp_path}", None), "users/a.png", b"png")
    assert str(tmp_path) not in str(caught.value)


def test_a_store_that_fails_in_the_middle_leaves_no_half_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = OutputStore(f"file://{tmp_path}", None)
    put(store, "first.png", b"png")

    def pipe(path: str, content: bytes) -> None:
        (tmp_path / path).write_bytes(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store._fs, "pipe", pipe)
    with pytest.raises(StoreError, match="No space left"):
        put(store, "second.png", b"png")
    assert [path.name for path in tmp_path.iterdir()] == ["first.png"]


def test_a_store_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_store, "SECONDS", 0.05)
    store, hold = OutputStore(f"file://{tmp_path}", None), threading.Event()
    monkeypatch.setattr(store, "_write", lambda *_: hold.wait(20))
    with pytest.raises(StoreError, match="no end within"):
        put(store, "x.png", b"png")
    hold.set()


def test_a_store_that_there_is_no_package_for_is_a_failure_as_well() -> None:
    with pytest.raises(StoreError, match=r"ValueError|ImportError"):
        put(OutputStore("nosuch://x", None), "x.png", b"png")


# --- the handler ---------------------------------------------------------------------------------------------------------


class Scene:
    def __init__(self, bench: Bench, client: EngineClient, directory: Path, role: str) -> None:
        self.bench = bench
        self.client = client
        self.files = directory / "media"
        self.handler = FileHandler(client, find(role), lambda: "", OutputStore(f"file://{self.files}", None))
        self.handler.intake = Intake(MediaLimits())
        self.context = Context()

    def ask(self, **more: Any) -> "asyncio.Task[list[Any]]":
        self.context = Context()

        async def collect() -> list[Any]:
            return [chunk async for chunk in self.handler.endpoint({**REQUEST, **more}, self.context)]

        return asyncio.create_task(collect())

    async def submitted(self, count: int = 1) -> list[str]:
        await self.bench.until(lambda: len(self.bench.backend.submitted) == count)
        return list(self.bench.backend.submitted)

    def made(self, rid: str, content: bytes) -> None:
        self.bench.service.output(rid, [], dict(STOP), {BLOBS: [content], "frames": 1})

    def stored(self) -> list[Path]:
        # os.walk passes over a folder that goes meanwhile
        return [Path(folder, name) for folder, _, names in os.walk(self.files) for name in names]


def run(directory: Path, test: Callable[[Scene], Awaitable[None]], role: str = "image", **facts: Any) -> None:
    async def main() -> None:
        async with bench_at(directory) as bench:
            bench.backend.facts = msgspec.structs.replace(bench.backend.facts, **facts)
            client = EngineClient(directory, "agent:0")
            client.hear_beat(Beat("engine", 1, "ready", "", 0.0, "", INCARNATION, 0))
            await bench.until(lambda: client.welcome is not None)
            scene = Scene(bench, client, directory, role)
            try:
                await test(scene)
                assert scene.handler.running == 0 and scene.handler.intake is not None and scene.handler.intake.held == 0
            finally:
                client.close()
                scene.handler.close()

    asyncio.run(main())


@pytest.mark.parametrize("size", [3, IN_PASSING + 1])
def test_a_file_is_in_the_answer_as_base64(tmp_path: Path, size: int) -> None:
    async def test(scene: Scene) -> None:
        chunks = scene.ask(response_format="b64_json")
        (rid,) = await scene.submitted()
        scene.made(rid, b"x" * size)
        (chunk,) = await chunks
        assert base64.b64decode(chunk["data"][0]["b64_json"]) == b"x" * size and not scene.stored()

    run(tmp_path, test)


def test_samples_are_stored_each_under_its_name(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        chunks = scene.ask(n=2)
        for rid in await scene.submitted(2):
            scene.made(rid, rid.encode())
        urls = [chunk["data"][0]["url"] for chunk in await chunks]
        contents = [await asyncio.to_thread(Path(url.removeprefix("file://")).read_bytes) for url in urls]
        assert contents == [rid.encode() for rid in scene.bench.backend.submitted]

    run(tmp_path, test)


def test_a_store_that_fails_is_an_error_that_says_so(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        await asyncio.to_thread(scene.files.touch)
        chunks = scene.ask()
        (rid,) = await scene.submitted()
        scene.made(rid, b"png")
        with pytest.raises(HttpError, match="could not be stored"):
            await chunks

    run(tmp_path, test)


def test_of_an_answer_that_fails_no_file_stays(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        chunks = scene.ask(n=2)
        first, second = await scene.submitted(2)
        scene.made(first, b"png")
        await scene.bench.until(lambda: bool(scene.stored()))
        scene.bench.service.failed(second, Code.ENGINE_DEAD, "the engine is stopping")
        with pytest.raises(EngineShutdown):
            await chunks
        await scene.bench.until(lambda: not scene.stored())

    run(tmp_path, test)


def test_a_client_that_goes_is_let_go_and_gets_no_file(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        chunks = scene.ask(n=2)
        first, second = await scene.submitted(2)
        scene.made(first, b"png")
        await scene.bench.until(lambda: bool(scene.stored()))
        scene.context.killed.set_result(True)
        await scene.bench.until(lambda: second in scene.bench.backend.aborted)
        scene.bench.service.output(second, [], {"type": "abort", "message": "Aborted"}, None)
        assert len(await chunks) <= 1  # the file is there a moment before its chunk
        await scene.bench.until(lambda: not scene.stored())

    run(tmp_path, test)


def test_a_verdict_of_sglangs_reaches_the_client_with_its_words(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        chunks = scene.ask()
        (rid,) = await scene.submitted()
        scene.bench.service.output(rid, [], {"type": "abort", "status_code": 500, "message": "out of memory"}, None)
        with pytest.raises(HttpError, match="out of memory"):
            await chunks

    run(tmp_path, test)


def test_a_reference_is_fetched_by_the_agents_own_rules(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        with pytest.raises(InvalidArgument, match="127"):
            await scene.ask(input_reference="http://127.0.0.1:1/x.png")
        png = base64.b64encode(_png()).decode()
        chunks = scene.ask(input_reference=f"data:image/png;base64,{png}", response_format="b64_json")
        (rid,) = await scene.submitted()
        assert scene.bench.backend.submitted[rid][BLOBS] == [_png()]
        scene.made(rid, b"png")
        assert await chunks

    run(tmp_path, test, media=["image"])


def test_no_other_media_are_fetched(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        data = {"image_url": [{"Url": "http://127.0.0.1:1/x.png"}]}
        chunks = scene.ask(multi_modal_data=data, response_format="b64_json")
        (rid,) = await scene.submitted()
        assert BLOBS not in scene.bench.backend.submitted[rid]
        scene.made(rid, b"png")
        assert await chunks

    run(tmp_path, test, media=["image"])


def _png() -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, format="PNG")
    return out.getvalue()
