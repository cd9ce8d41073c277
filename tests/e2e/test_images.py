"""An image node on SGLang's real DiffGenerator, through the real frontend: equal to it called directly, and what goes wrong."""

import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.e2e.conftest import MODEL
from tests.e2e.diffusion import STEPS, Later, contents, direct, number, parameters, pipeline, post, runs, served
from tests.harness import Node, gone, instances, marked_pids, nothing_left, send, wait_for
from tests.leftovers import marks

SEEDS = (7, 8)
GUIDANCE = 7.5
LIMITS = {"DYN_CANARY_WAIT_TIME": "1", "DYN_HEALTH_CHECK_REQUEST_TIMEOUT": "2"}
"""Shorter than a generation of SLOW: a canary waits behind it."""
SLOW = {"size": "768x768", "nvext": {"num_inference_steps": 50, "seed": 1}, "response_format": "b64_json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline(tmp_path_factory.mktemp("models"), "image")


@pytest.fixture(scope="module")
def starting(model: Path, store: Path) -> Iterator[Node]:
    with served(model, "image", store, env=LIMITS) as node:
        yield node.start()


@pytest.fixture(scope="module")
def reference(model: Path, starting: Node, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """PNGs of SEEDS, and of the first one without guidance."""
    wanted = [parameters(seed, GUIDANCE) for seed in SEEDS]
    found = direct(model, "image", [*wanted, parameters(SEEDS[0], 0.0)], tmp_path_factory.mktemp("direct"))
    assert len(set(found)) == len(found), "the answers must tell seeds and guidance apart"
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "media"


@pytest.fixture(scope="module")
def node(starting: Node, reference: list[bytes]) -> Node:
    """It has started beside the generator that its answers are compared with."""
    return starting.wait_ready(240)


def generate(node: Node, **body: Any) -> requests.Response:
    nvext = {"num_inference_steps": STEPS, "seed": SEEDS[0], **body.pop("nvext", {})}
    return post(node, "image", **{"response_format": "b64_json", "nvext": nvext, **body})


def stored(store: Path) -> set[Path]:
    return {path for path in store.rglob("*") if path.is_file()}


def slow(node: Node, **body: Any) -> Later:
    """A generation that runs."""
    later = Later(lambda: post(node, "image", **{**SLOW, **body}))
    wait_for("it runs", lambda: runs(node), 30)
    return later


def test_images_equal_those_of_the_generator_called_directly(node: Node, reference: list[bytes]) -> None:
    assert contents(generate(node, n=2)) == reference[:2], "picture i has seed + i"
    assert contents(generate(node)) == reference[:1]
    assert contents(generate(node, nvext={"guidance_scale": 0.0})) == reference[2:], "0 is 0, not the default"


def test_a_file_is_stored_where_its_url_says_and_anybody_may_read_it(node: Node, reference: list[bytes], store: Path) -> None:
    answer = generate(node, response_format="url", user="alice@example.com", n=2)
    assert contents(answer) == reference[:2]
    for each in answer.json()["data"]:
        path = Path(each["url"].removeprefix("file://"))
        assert path.is_relative_to(store / "users" / "alice@example.com" / "generations") and path.suffix == ".png"
        assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("user", ["../../../etc", "..", "/etc/passwd", "a/b", "x" * 500, "\u202e\n"])
def test_a_user_is_no_way_out_of_the_store(node: Node, store: Path, user: str) -> None:
    before = stored(store.parent)
    (path,) = (
        Path(each["url"].removeprefix("file://")) for each in generate(node, response_format="url", user=user).json()["data"]
    )
    assert ".." not in path.parts and path.is_relative_to(store / "users") and len(path.relative_to(store).parts) == 5
    assert stored(store.parent) - before == {path}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"size": "250x250"}, "multiples of 16"),
        ({"size": "0x0"}, "size"),
        ({"size": "big"}, "size"),
        ({"size": "-256x256"}, "size"),
        ({"size": "100000x100000"}, "64000000"),
        ({"n": 11}, "n"),
        ({"nvext": {"num_inference_steps": 0}}, "num_inference_steps"),
        ({"nvext": {"guidance_scale": -1.0}}, "guidance_scale"),
        ({"response_format": "gif"}, "gif"),
        ({"input_reference": "http://127.0.0.1:1/x.png"}, "input_reference"),
    ],
)
def test_a_wrong_request_is_a_400_that_says_why(node: Node, reference: list[bytes], body: dict[str, Any], named: str) -> None:
    answer = generate(node, **body)
    assert answer.status_code == 400 and named in answer.text, answer.text
    assert contents(generate(node)) == reference[:1], "the next one is served"


def test_four_at_once_are_made_one_after_the_other(node: Node, reference: list[bytes]) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: generate(node), range(4)))
    assert [contents(answer) for answer in answers] == [reference[:1]] * 4


def test_a_file_that_can_not_be_stored_costs_its_request(node: Node, reference: list[bytes], store: Path) -> None:
    users, aside = store / "users", store / "aside"
    users.rename(aside)
    users.touch()
    try:
        answer = generate(node, response_format="url")
        assert answer.status_code == 502, answer.text
    finally:
        users.unlink()
        aside.rename(users)
    assert contents(generate(node, response_format="url")) == reference[:1]
    assert node.status()["incarnation"] == 1


def test_a_client_that_goes_is_let_go_at_once_and_leaves_no_file(node: Node, reference: list[bytes], store: Path) -> None:
    before, made = stored(store), number(node, "generations_total")
    with pytest.raises(requests.Timeout):
        requests.post(
            f"{node.url}/v1/images/generations",
            json={"model": MODEL, "prompt": "x", **SLOW, "response_format": "url"},
            timeout=1.0,
        )
    wait_for("the agent is free", lambda: number(node, "inflight", "agent:0") == 0, 2)
    assert number(node, "running") == 1, "SGLang goes on with it: the test proves nothing otherwise"
    assert contents(generate(node)) == reference[:1], "which the next one waits for"
    wait_for("both are counted", lambda: number(node, "generations_total") >= made + 2, 5)
    assert stored(store) == before


def test_a_canary_behind_a_generation_is_no_strike(node: Node) -> None:
    """The generation lasts longer than the limits; its steps show that the engine works."""
    log = node.runtime_dir / "log" / "prober.log"
    said = log.read_text()
    later = slow(node)
    began = time.monotonic()
    assert later.join().status_code == 200
    assert later.ended - began > 3, "it was over before a canary was due: the test proves nothing"
    assert log.read_text() == said and node.status()["state"] == "ready"


def test_a_killed_scheduler_ends_its_request_at_once_and_the_engine_is_back(
    node: Node, reference: list[bytes], figures: Callable[..., None]
) -> None:
    old = marks(node)
    later = slow(node)
    assert in_shared_memory(old), "SGLang has something there while it is at a request"
    engine = psutil.Process(node.pid("engine"))
    tree = [engine, *engine.children(recursive=True)]
    (victim,) = (each.pid for each in tree if "sgl_diffusion::scheduler" in " ".join(each.cmdline()))
    began = time.monotonic()
    send(victim, signal.SIGKILL)
    answer = later.join()
    ended = later.ended - began
    wait_for("withdrawn", lambda: not instances(node), 5, every=0.002)
    wait_for("nothing of it left", lambda: all(gone(each.pid) for each in tree), 5)
    assert answer.status_code == 503, answer.text
    assert ended < 0.5
    assert "sgl_diffusion::scheduler" in (node.runtime_dir / "log" / "engine.log").read_text(errors="replace")
    wait_for("the next engine", lambda: node.status().get("incarnation") == 2, 60)
    node.wait_ready(240)
    figures(request_end_ms=round(ended * 1e3), back_s=round(time.monotonic() - began, 1))
    assert contents(generate(node)) == reference[:1]
    assert not in_shared_memory(old)


def test_a_stop_loses_nothing_in_flight_and_leaves_nothing(node: Node) -> None:
    later, old = slow(node), marks(node)
    ports = [connection.laddr.port for pid in marked_pids(node.runtime_dir) for connection in listening(pid)]
    assert len(ports) > 3
    node.terminate()
    answer = later.join()
    assert len(contents(answer)) == 1
    assert node.wait_stopped(60) == 0
    nothing_left(node)
    assert not in_shared_memory(old)
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, port


def in_shared_memory(wanted: set[str]) -> list[str]:
    """What lies there of lives with these marks; SGLang's diffusion allows no dash in its names."""
    marks = [mark.removeprefix("sgnode-") for mark in wanted]
    return [path.name for path in Path("/dev/shm").glob("sgldiffusion-*") if any(mark in path.name for mark in marks)]


def listening(pid: int) -> list[Any]:
    try:
        return [each for each in psutil.Process(pid).net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    except psutil.Error:
        return []
