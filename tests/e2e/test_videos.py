"""A video node on SGLang's real DiffGenerator, through the real frontend: equal to it called directly, and what goes wrong."""

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imageio
import pytest
import requests

from tests.e2e.conftest import MODEL
from tests.e2e.diffusion import STEPS, Later, contents, direct, number, parameters, pipeline, post, runs, served
from tests.harness import Node, nothing_left, wait_for

SEED = 7
FPS = 8
FRAMES = 5
GUIDANCE = 5.0
NVEXT = {"fps": FPS, "num_frames": FRAMES, "num_inference_steps": STEPS, "seed": SEED}
SLOW = {"nvext": {**NVEXT, "num_frames": 9, "num_inference_steps": 200}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline(tmp_path_factory.mktemp("models"), "video")


@pytest.fixture(scope="module")
def starting(model: Path, store: Path) -> Iterator[Node]:
    with served(model, "video", store, "--media-output-http-url", "https://media.example/x/") as node:
        yield node.start()


@pytest.fixture(scope="module")
def reference(model: Path, starting: Node, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    wanted = [parameters(SEED, GUIDANCE, num_frames=FRAMES, fps=FPS)]
    return direct(model, "video", wanted, tmp_path_factory.mktemp("direct"))[0]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "media"


@pytest.fixture(scope="module")
def node(starting: Node, reference: bytes) -> Node:
    """It has started beside the generator that its answers are compared with."""
    return starting.wait_ready(240)


def generate(node: Node, **body: Any) -> requests.Response:
    return post(node, "video", **{"response_format": "b64_json", "nvext": NVEXT, **body})


def frames(content: bytes) -> int:
    with imageio.get_reader(io.BytesIO(content), format="mp4") as reader:
        return sum(1 for _ in reader)


def test_a_video_equals_that_of_the_generator_called_directly(node: Node, reference: bytes) -> None:
    answer = generate(node)
    assert contents(answer) == [reference] and frames(reference) == FRAMES
    body = answer.json()
    assert (body["object"], body["status"], body["progress"], body["model"]) == ("video", "completed", 100, MODEL)
    assert body["id"].startswith("video-") and body["inference_time_s"] > 0


def test_frames_are_those_that_the_model_can_make(node: Node) -> None:
    """4k + 1, rounded down: 8 are asked for, as fps x seconds."""
    nvext = {"fps": FPS, "num_inference_steps": STEPS, "seed": SEED}
    assert [frames(content) for content in contents(generate(node, seconds=1, nvext=nvext))] == [5]


def test_a_file_is_stored_under_the_requests_id_and_has_the_public_url(node: Node, reference: bytes, store: Path) -> None:
    body = generate(node, response_format="url").json()
    url = body["data"][0]["url"]
    assert url == f"https://media.example/x/{body['id'].removeprefix('video-')}.mp4"
    assert (store / url.rpartition("/")[2]).read_bytes() == reference


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"size": "250x250"}, "multiples of 16"),
        ({"size": "big"}, "size"),
        ({"size": "8000x8000", "nvext": {**NVEXT, "num_frames": 100}}, "num_frames"),
        ({"output_format": "webm"}, "output_format"),
        ({"seconds": 0, "nvext": {}}, "seconds"),
        ({"nvext": {**NVEXT, "fps": 0}}, "fps"),
        ({"nvext": {**NVEXT, "num_inference_steps": 201}}, "num_inference_steps"),
        ({"input_reference": "https://example.invalid/x.png"}, "input_reference"),
    ],
)
def test_a_wrong_request_is_a_400_that_says_why(node: Node, body: dict[str, Any], named: str) -> None:
    answer = generate(node, **body)
    assert answer.status_code == 400 and named in answer.text, answer.text


def test_a_streamed_answer_is_one_event_and_so_is_an_error(node: Node, reference: bytes) -> None:
    for body, wanted in (({}, "data"), ({"size": "250x250"}, "error")):
        lines = [line for line in generate(node, stream=True, **body).text.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]" and len(lines) == 2
        assert wanted in json.loads(lines[0][6:])


def test_four_at_once_are_made_one_after_the_other(node: Node, reference: bytes) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: generate(node), range(4)))
    assert [contents(answer) for answer in answers] == [[reference]] * 4


def test_a_client_that_goes_is_let_go_at_once(node: Node, reference: bytes, store: Path) -> None:
    before = set(store.iterdir())
    with pytest.raises(requests.Timeout):
        body = {"model": MODEL, "prompt": "x", "size": "256x256", **SLOW}
        requests.post(f"{node.url}/v1/videos", json=body, timeout=0.7)
    wait_for("the agent is free", lambda: number(node, "inflight", "agent:0") == 0, 2)
    assert number(node, "running") == 1, "SGLang goes on with it: the test proves nothing otherwise"
    assert contents(generate(node)) == [reference]
    assert set(store.iterdir()) == before


def test_a_stop_loses_nothing_in_flight_and_leaves_nothing(node: Node) -> None:
    later = Later(lambda: generate(node, **SLOW))
    wait_for("it runs", lambda: runs(node), 30)
    node.terminate()
    (content,) = contents(later.join())
    assert frames(content) == 9
    assert node.wait_stopped(60) == 0
    nothing_left(node)
