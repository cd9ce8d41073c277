"""Image and video generation behind the seam: the queue, aborts, what SGLang swallows, progress, and its scheduler's death."""

import asyncio
import io
import multiprocessing
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio
import numpy
import pytest
import zmq
from PIL import Image

from procs.engine.adapter.diffusion import backend as module
from procs.engine.adapter.diffusion import files, generator, progress
from procs.engine.adapter.diffusion.backend import QUEUE, DiffusionBackend
from procs.keeper import life
from shared.blobs import BLOBS
from shared.config import MediaLimits, NodeConfig
from shared.errors import Code, RequestError
from tests.harness import process_state, send, wait_for

PARAMS = {"prompt": "p", "width": 32, "height": 32, "num_inference_steps": 4, "guidance_scale": 5.0, "seed": 7}


class Task:
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def is_image_gen(self) -> bool:
        return self.kind == "image"

    def accepts_image_input(self) -> bool:
        return False


class Scripted:
    """Stands for DiffGenerator: a request waits until the test lets it go on, and does what its prompt says."""

    def __init__(self, directory: Path, kind: str = "image") -> None:
        arch = SimpleNamespace(spatial_compression_ratio=8), SimpleNamespace(patch_size=(1, 2, 2))
        config = SimpleNamespace(
            task_type=Task(kind), vae_config=SimpleNamespace(arch_config=arch[0]), dit_config=SimpleNamespace(arch_config=arch[1])
        )
        self.server_args = SimpleNamespace(pipeline_config=config, progress_endpoint=f"ipc://{directory}/progress")
        self.local_scheduler_process: list[Any] = []
        self.failure = ""
        self.asked: list[dict[str, Any]] = []
        self.at_once = threading.Semaphore(0)
        self.closed = False

    def generate(self, sampling_params_kwargs: dict[str, Any]) -> Any:
        self.asked.append(sampling_params_kwargs)
        self.at_once.acquire()
        match sampling_params_kwargs["prompt"]:
            case "argument":
                raise ValueError("seed must be a non-negative int")
            case "defect":
                raise KeyError("layer")
            case "swallowed":
                self.failure = f"Error executing request {sampling_params_kwargs['request_id']}: shape\n is invalid"
                return None
            case "silent":
                return None
        count = sampling_params_kwargs.get("num_frames", 1)
        frames = [numpy.full((32, 32, 3), 10 * i, dtype=numpy.uint8) for i in range(count)]
        return SimpleNamespace(frames=frames)

    def shutdown(self) -> None:
        self.closed = True


class Sink:
    def __init__(self) -> None:
        self.ends: dict[str, Any] = {}
        self.changed = asyncio.Event()

    def output(self, rid: str, token_ids: list[int], finish: Any, meta: Any, text: str | None = None) -> None:
        assert rid not in self.ends, "one end"
        self.ends[rid] = (finish, meta)
        self.changed.set()

    def failed(self, rid: str, code: Code, message: str) -> None:
        assert rid not in self.ends, "one end"
        self.ends[rid] = (code, message)
        self.changed.set()

    async def end(self, rid: str) -> Any:
        async with asyncio.timeout(20):
            while rid not in self.ends:
                self.changed.clear()
                await self.changed.wait()
        return self.ends[rid]


@pytest.fixture(autouse=True)
def _own_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of pytest has its own."""
    monkeypatch.setattr(module.logs, "take_back", lambda: None)


def config(directory: Path, role: str = "image") -> NodeConfig:
    flag = {"image": "--image-diffusion-worker", "video": "--video-generation-worker"}[role]
    return NodeConfig(
        name="t", runtime_dir=str(directory), version="0", role=role, model_path=str(directory), served_model_name="m",
        worker_argv=["--model-path", str(directory), flag, "--discovery-backend", "file"], media=MediaLimits(max_pixels=1000),
    )  # fmt: skip


def run(directory: Path, test: Callable[[DiffusionBackend, Scripted, Sink], Awaitable[None]], kind: str = "image") -> None:
    scripted = Scripted(directory, kind)
    backend = DiffusionBackend(config(directory, kind), 1, lambda _: scripted)

    async def main() -> None:
        sink = Sink()
        backend.start(sink, lambda: None)
        await backend.warm()
        try:
            await test(backend, scripted, sink)
        finally:
            for _ in range(QUEUE + 2):
                scripted.at_once.release()
            backend.close()

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_for, "the condition", condition, 20, 0.001)


def payload(prompt: str = "p", **more: Any) -> dict[str, Any]:
    return {"call": "diffuse", "params": {**PARAMS, "prompt": prompt, **more}}


def test_requests_are_made_one_after_the_other_in_their_order(tmp_path: Path) -> None:
    async def test(backend: DiffusionBackend, scripted: Scripted, sink: Sink) -> None:
        for rid in ("a", "b", "c"):
            backend.submit(rid, payload())
        await until(lambda: len(scripted.asked) == 1)
        numbers = backend.numbers()
        assert (numbers["running_dp0"], numbers["waiting_dp0"], numbers["scheduler_busy_dp0"]) == (1, 2, 1)
        for rid in ("a", "b", "c"):
            scripted.at_once.release()
            finish, meta = await sink.end(rid)
            assert finish == {"type": "stop"} and meta["frames"] == 1
            assert Image.open(io.BytesIO(meta[BLOBS][0])).size == (32, 32)
        assert [each["request_id"] for each in scripted.asked] == ["a", "b", "c"]
        assert all(each["save_output"] is False and each["seed"] == 7 for each in scripted.asked)
        numbers = backend.numbers()
        assert (numbers["running_dp0"], numbers["scheduler_step_seconds_dp0"]) == (0, 0)
        assert (numbers["generations_total"], numbers["scheduler_outputs_dp0"]) == (3, 3)

    run(tmp_path, test)


def test_an_aborted_one_is_let_go_at_once_and_what_was_made_of_it_is_dropped(tmp_path: Path) -> None:
    async def test(backend: DiffusionBackend, scripted: Scripted, sink: Sink) -> None:
        for rid in ("running", "waiting", "last"):
            backend.submit(rid, payload())
        await until(lambda: len(scripted.asked) == 1)
        for rid in ("running", "waiting", "running", "nobody"):
            backend.abort(rid)
        for rid in ("running", "waiting"):
            assert await sink.end(rid) == ({"type": "abort", "message": "Aborted"}, None)
        assert backend.numbers()["running_dp0"] == 1, "SGLang goes on with it"
        scripted.at_once.release()
        scripted.at_once.release()
        await sink.end("last")
        assert [each["request_id"] for each in scripted.asked] == ["running", "last"]
        assert backend.numbers()["scheduler_outputs_dp0"] == 1

    run(tmp_path, test)


def test_a_full_queue_takes_canaries_alone(tmp_path: Path) -> None:
    async def test(backend: DiffusionBackend, scripted: Scripted, sink: Sink) -> None:
        for number in range(QUEUE + 1):  # and the one that runs
            backend.submit(str(number), payload())
        assert not sink.ends
        backend.submit("late", payload())
        code, message = sink.ends["late"]
        assert code == Code.OVERLOADED and str(QUEUE) in message
        backend.submit("canary", {**payload(), "canary": True})
        assert "canary" not in sink.ends and backend.numbers()["waiting_dp0"] == QUEUE + 1

    run(tmp_path, test)


def test_canaries_go_before_all_that_waits_in_their_order(tmp_path: Path) -> None:
    async def test(backend: DiffusionBackend, scripted: Scripted, sink: Sink) -> None:
        for rid in ("running", "a", "b"):
            backend.submit(rid, payload())
        for rid in ("canary", "canary of another prober"):
            backend.submit(rid, {**payload(), "canary": True})
        for _ in range(5):
            scripted.at_once.release()
        await sink.end("b")
        asked = [each["request_id"] for each in scripted.asked]
        assert asked == ["running", "canary", "canary of another prober", "a", "b"]

    run(tmp_path, test)


def test_media_that_wait_are_bounded_by_their_bytes(tmp_path: Path) -> None:
    async def test(backend: DiffusionBackend, scripted: Scripted, sink: Sink) -> None:
        backend._most = 100
        for rid, size in (("running", 100), ("a", 60), ("b", 40)):
            backend.submit(rid, {**payload(), BLOBS: [bytes(size // 2)] * 2})
        assert not sink.ends, "what runs doesn't wait"
        backend.submit("late", {**payload(), BLOBS: [b"x"]})
        code, message = sink.ends["late"]
        assert code == Code.OVERLOADED and "media" in message
        backend.submit("text", payload())
        backend.abort("b")
        await sink.end("b")
        backend.submit("again", {**payload(), BLOBS: [b"x"]})
        assert set(sink.ends) == {"late", "b"}

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("asked", "expected", "words"),
    [
        (payload("argument"), Code.INVALID, "seed must be"),
        (payload("swallowed", width=33), Code.INVALID, "size 33x32: width and height in multiples of 16"),
        (payload("silent", height=40), Code.INVALID, "multiples of 16"),
        (payload("swallowed"), 500, "shape is invalid"),
        (payload("silent"), 500, "SGLang has made nothing"),
        (payload("defect"), 500, "KeyError"),
    ],
)
def test_what_sglang_swallows_is_said(tmp_path: Path, asked: dict[str, Any], expected: Any, words: str) -> None:
    async def test(backend: DiffusionBackend, scripted: Scripted, sink: Sink) -> None:
        scripted.at_once.release()
        backend.submit("r", asked)
        first, second = await sink.end("r")
        code, message = (first, second) if expected == Code.INVALID else (first["status_code"], first["message"])
        assert code == expected and words in message and "executing request" not in message and "\n" not in message
        scripted.at_once.release()
        backend.submit("next", payload())
        assert (await sink.end("next"))[0] == {"type": "stop"}

    run(tmp_path, test)


def test_a_video_has_the_frames_that_were_made(tmp_path: Path) -> None:
    async def test(backend: DiffusionBackend, scripted: Scripted, sink: Sink) -> None:
        before = backend.numbers()["scheduler_steps_dp0"]
        scripted.at_once.release()
        backend.submit("r", payload(num_frames=5, fps=8))
        _, meta = await sink.end("r")
        with imageio.get_reader(io.BytesIO(meta[BLOBS][0]), format="mp4") as reader:
            assert sum(1 for _ in reader) == meta["frames"] == 5
        assert backend.numbers()["scheduler_steps_dp0"] >= before + 7, "each frame that is encoded counts, beginning and end too"

    run(tmp_path, test, "video")


def test_a_picture_to_start_from_is_a_file_for_as_long_as_it_is_needed(tmp_path: Path) -> None:
    async def test(backend: DiffusionBackend, scripted: Scripted, sink: Sink) -> None:
        backend.submit("r", {**payload(), BLOBS: [b"a picture"]})
        await until(lambda: len(scripted.asked) == 1)
        paths.append(Path(scripted.asked[0]["image_path"]))
        contents.append(await asyncio.to_thread(paths[0].read_bytes))
        scripted.at_once.release()
        await sink.end("r")

    paths: list[Path] = []
    contents: list[bytes] = []
    run(tmp_path, test)
    assert contents == [b"a picture"] and not paths[0].exists()


def test_steps_that_sglang_tells_are_progress(tmp_path: Path) -> None:
    async def test(backend: DiffusionBackend, scripted: Scripted, sink: Sink) -> None:
        backend.submit("r", payload())
        await until(lambda: len(scripted.asked) == 1)
        before = backend.numbers()
        await until(lambda: backend.numbers()["scheduler_step_seconds_dp0"] > 0.05)
        with zmq.Context() as context, context.socket(zmq.PUSH) as push:
            push.connect(scripted.server_args.progress_endpoint)
            push.send_json(["r", 1, 4])
            await until(lambda: backend.numbers()["scheduler_steps_dp0"] == before["scheduler_steps_dp0"] + 1)
        assert backend.numbers()["scheduler_step_seconds_dp0"] < 0.05

    run(tmp_path, test)


def test_without_progress_the_log_says_what_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scripted = Scripted(tmp_path)
    scripted.server_args.progress_endpoint = None
    backend = DiffusionBackend(config(tmp_path), 1, lambda _: scripted)

    async def main() -> None:
        backend.start(Sink(), lambda: None)

    asyncio.run(main())
    assert "CPU time counts" in caplog.text


def _spin() -> None:
    while True:
        pass


def test_a_busy_scheduler_is_progress_and_a_stopped_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOOK_SECONDS", 0.1)

    async def test(backend: DiffusionBackend, scripted: Scripted, sink: Sink) -> None:
        scripted.local_scheduler_process = [process]
        backend.submit("r", payload())
        await until(lambda: len(scripted.asked) == 1)
        before = backend.numbers()["scheduler_steps_dp0"]
        await until(lambda: backend.numbers()["scheduler_steps_dp0"] >= before + 3)
        send(process.pid, signal.SIGSTOP)
        backend.numbers()
        await until(lambda: backend.numbers()["scheduler_step_seconds_dp0"] > 1)
        still = backend.numbers()["scheduler_steps_dp0"]
        await until(lambda: backend.numbers()["scheduler_step_seconds_dp0"] > 2)
        assert backend.numbers()["scheduler_steps_dp0"] == still
        assert process_state(process.pid) == "T"
        scripted.local_scheduler_process = []

    with child(_spin) as process:
        run(tmp_path, test)


def test_cpu_time_counts_from_a_fifth_of_the_time_since_the_last_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake time and /proc."""
    now = [100.0]
    monkeypatch.setattr(progress, "PROC", tmp_path)
    monkeypatch.setattr(progress, "TICKS", 100)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    counted = progress.Progress()

    def used(pid: int, user: int, system: int) -> None:
        (tmp_path / str(pid)).mkdir(exist_ok=True)
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a (b) c) S 1 1 1 0 -1 0 0 0 0 0 {user} {system} 99 99 20 0 1 0 5 0 0")

    def look(seconds: float, *pids: int) -> int:
        now[0] += seconds
        counted.look(pids)
        return counted.steps

    used(1, 500, 500)
    used(2, 0, 0)
    assert look(0, 1, 2) == 0, "the first is nothing to compare with"
    used(1, 510, 505)
    assert look(0.5, 1, 2) == 0, "too early"
    used(2, 3, 2)
    assert look(0.5, 1, 2) == 1 and counted.at == 101, "20 ticks in a second, user and system, of both"
    used(1, 519, 510)
    assert look(1, 1, 2) == 1, "14 ticks in a second: threads that poll"
    used(1, 600, 510)
    assert look(10, 1, 2) == 1, "81 ticks in ten"
    look(1)
    used(1, 900, 900)
    assert look(5, 1, 2) == 1, "what was used between two generations is no progress of the second"
    used(1, 940, 900)
    assert look(1, 1, 2) == 2
    assert look(1, 1, 3) == 2, "one that is gone"


def _sleep() -> None:
    threading.Event().wait()


@contextmanager
def child(does: Callable[[], None] = _sleep) -> Iterator[Any]:
    process = multiprocessing.get_context("spawn").Process(target=does, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def test_a_scheduler_that_ends_takes_the_engine_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(module.os, "_exit", left.append)
    monkeypatch.setattr(module.logging, "shutdown", lambda: None)
    with child() as process:

        async def test(backend: DiffusionBackend, scripted: Scripted, sink: Sink) -> None:
            scripted.local_scheduler_process = [process]
            backend.start(sink, lambda: None)
            backend.submit("r", payload())
            process.kill()
            await until(lambda: bool(left))
            assert left[0] == module.DEAD_EXIT and not sink.ends, "the keeper's word ends the requests"
            asyncio.get_running_loop().remove_reader(process.sentinel)

        run(tmp_path, test)


def test_a_stop_shuts_an_idle_generator_down_and_kills_a_busy_one(tmp_path: Path) -> None:
    async def idle(backend: DiffusionBackend, scripted: Scripted, sink: Sink) -> None:
        backend.close()
        assert scripted.closed

    run(tmp_path, idle)
    with child() as process:

        async def busy(backend: DiffusionBackend, scripted: Scripted, sink: Sink) -> None:
            scripted.local_scheduler_process = [process]
            backend.submit("r", payload())
            await until(lambda: len(scripted.asked) == 1)
            backend.close()
            assert not scripted.closed and not process.is_alive()

        run(tmp_path, busy)


def test_a_model_that_makes_something_else_ends_the_engine_before_its_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(module.os, "_exit", leave)
    monkeypatch.setattr(module.logging, "shutdown", lambda: None)
    scripted = Scripted(tmp_path, "video")
    with pytest.raises(Left) as left:
        DiffusionBackend(config(tmp_path, "image"), 1, lambda _: scripted)
    assert left.value.args == (module.OTHER_KIND_EXIT,) and not scripted.closed
    assert [each.levelname for each in caplog.records if "--video-generation-worker" in each.message] == ["CRITICAL"]


def test_it_has_no_controls(tmp_path: Path) -> None:
    async def test(backend: DiffusionBackend, scripted: Scripted, sink: Sink) -> None:
        with pytest.raises(RequestError) as caught:
            await backend.control("route", {"path": "pause_generation", "body": {}})
        assert caught.value.code == Code.UNKNOWN
        with pytest.raises(ValueError, match="load_lora"):
            await backend.control("load_lora", {})
        assert backend.facts.max_pixels == 1000 and backend.facts.media == []

    run(tmp_path, test)


def test_a_size_step_is_the_scale_times_the_patch(tmp_path: Path) -> None:
    scripted = Scripted(tmp_path)
    assert generator.size_step(scripted) == 16
    scripted.server_args.pipeline_config.dit_config.arch_config.patch_size = 1
    assert generator.size_step(scripted) == 8
    scripted.server_args.pipeline_config = SimpleNamespace()
    assert generator.size_step(scripted) == 16, "what most models take"


def test_a_picture_is_a_png_without_loss() -> None:
    frame = numpy.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=numpy.uint8)
    assert numpy.array_equal(numpy.asarray(Image.open(io.BytesIO(files.png(frame)))), frame)


def test_what_a_killed_generator_left_in_shared_memory_goes_with_its_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shm"
    shared.mkdir()
    monkeypatch.setattr(life, "SHARED_PLACES", (shared,))
    (tmp_path / "run").mkdir()
    own = life.begin(tmp_path / "run")
    folder = shared / f"sgldiffusion-request-{own.shm_mark.replace('-', '_')}_abc"
    folder.mkdir()
    (folder / "array.npy").touch()
    (shared / f"sem.{own.shm_mark}-x").touch()
    (shared / "sgldiffusion-request-other").mkdir()
    own.end()
    assert [path.name for path in shared.iterdir()] == ["sgldiffusion-request-other"]
