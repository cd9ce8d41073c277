"""Images through real nodes: answers equal to the engine's own, clients that go, drains, and what hostile ones send."""

import concurrent.futures
import http.client
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests import media
from tests.e2e.conftest import MODEL
from tests.e2e.direct import Call, direct
from tests.frontend import Frontend
from tests.harness import CPU, ONE_THREAD, SGNODE, Node, wait_for
from tests.media import Hostile, Origin

TOKENS = 24
ENGINE = {**ONE_THREAD, "TORCHDYNAMO_DISABLE": "1"}
"""Without the second an engine compiles for each new shape of an image, for seconds."""
GROWTH_MB = {"agent:0": 200, "engine": 1200}
"""What the corpus may take at its peak. The engine decodes the images that fit, a few at a time (adapter/pixels.py)."""
TEXT = "The quick brown fox"


def image(seed: int, form: str = "PNG") -> dict[str, Any]:
    return media.part(media.url(media.good(seed, form), f"image/{form.lower()}"))


def text(words: str = TEXT) -> dict[str, Any]:
    return {"type": "text", "text": words}


Content = list[dict[str, Any]]
CHATS: dict[str, Content] = {
    "no image": [text()],
    "one": [image(1), text()],
    "another": [image(2), text()],
    "two": [image(2), text("and then"), image(3), text()],
    "two, the other way": [image(3), text("and then"), image(2), text()],
    "between words": [text("a"), image(3, "JPEG"), text("b"), image(4, "WEBP"), text("c"), image(3, "JPEG")],
    "the same twice": [image(1), text("and"), image(1)],
    "a large one": [media.part(media.url(media.noise(1 << 20)))],
}


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "demo-vision"
    subprocess.run([SGNODE, "demo-model", "--vision", str(path)], check=True, capture_output=True, timeout=120)
    return path


@dataclass
class Scene:
    node: Node
    origin: Origin
    allowed: Path
    """The directory whose files may be read."""
    answers: dict[str, str]
    """To CHATS, of an engine called directly."""


@pytest.fixture(scope="module")
def scene(vision: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    allowed = tmp_path_factory.mktemp("media") / "allowed"
    allowed.mkdir()
    env = {**ENGINE, "DYN_MM_ALLOW_INTERNAL": "1", "DYN_MM_LOCAL_PATH": str(allowed)}
    with Origin() as origin, Node(str(vision), "--served-model-name", MODEL, *CPU, "--drain-grace", "0", env=env) as node:
        node.start()
        answers = answered_directly(vision, tmp_path_factory.mktemp("direct"))
        yield Scene(node.wait_ready(240), origin, allowed, answers)


def answered_directly(model: Path, temporary: Path) -> dict[str, str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    calls: list[Call] = []
    for content in CHATS.values():
        chat = [{"role": "user", "content": content}]
        ids = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)
        images = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        params = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
        calls.append(("generate", {"input_ids": ids, "image_data": images or None, "sampling_params": params}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        found = direct(model, [], calls, temporary)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
    answers = dict(zip(CHATS, texts, strict=True))
    assert len(set(texts)) == len(CHATS), f"the chats must tell the answers apart: {answers}"
    return answers


def body(content: Any, **more: Any) -> dict[str, Any]:
    fixed = {"model": MODEL, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    return {**fixed, "messages": [{"role": "user", "content": content}], **more}


def ask(url: str, content: Any, **more: Any) -> requests.Response:
    return requests.post(f"{url}/v1/chat/completions", json=body(content, **more), timeout=60)


def said(answer: requests.Response) -> str:
    assert answer.status_code == 200, answer.text[:1000]
    found = answer.json()
    assert found["usage"]["completion_tokens"] == TOKENS
    return str(found["choices"][0]["message"]["content"])


def streamed(url: str, content: Any) -> tuple[str, int]:
    """The text, and in how many chunks it came."""
    answer = requests.post(f"{url}/v1/chat/completions", json=body(content, stream=True), stream=True, timeout=60)
    assert answer.status_code == 200, answer.text[:1000]
    events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith(b"data: {")]
    pieces = [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]
    return "".join(pieces), len(pieces)


# --- good ones -----------------------------------------------------------------------------------------------------------


def test_answers_equal_the_engine_s_streamed_and_not_one_by_one_and_together(scene: Scene) -> None:
    url = scene.node.url
    assert {name: said(ask(url, content)) for name, content in CHATS.items()} == scene.answers
    found = {name: streamed(url, content) for name, content in CHATS.items()}
    assert {name: words for name, (words, _) in found.items()} == scene.answers
    assert sum(pieces for _, pieces in found.values()) > 3 * len(CHATS), "they come bit by bit"
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for name, words in pool.map(lambda name: (name, said(ask(url, CHATS[name]))), [*CHATS] * 4):
            assert words == scene.answers[name], name


def test_a_file_and_a_page_are_as_good_as_a_data_url(scene: Scene) -> None:
    (scene.allowed / "one.png").write_bytes(media.good(1))
    for reference in ((scene.allowed / "one.png").as_uri(), scene.origin.url + "/good", scene.origin.redirect("/to", "/good")):
        assert said(ask(scene.node.url, [media.part(reference), text()])) == scene.answers["one"], reference


# --- clients that go -----------------------------------------------------------------------------------------------------


def fetching(scene: Scene, count: int = 1) -> list[http.client.HTTPConnection]:
    """Clients whose image the agent asks for from an origin that never answers."""
    asked = scene.origin.asked.count("/never")
    found = []
    for _ in range(count):
        connection = http.client.HTTPConnection(scene.node.url.removeprefix("http://"), timeout=60)
        content = [media.part(scene.origin.url + "/never"), image(1), text()]
        connection.request("POST", "/v1/chat/completions", json.dumps(body(content)), {"Content-Type": "application/json"})
        found.append(connection)
    wait_for("the origin is asked", lambda: scene.origin.asked.count("/never") >= asked + count, 30)
    return found


def waited_for(node: Node) -> int:
    """Requests in the agent, whether the engine has them or not."""
    return int(node.process_row("agent:0")["numbers"]["inflight"])


def test_a_client_that_goes_while_its_image_is_fetched_ends_the_fetch(scene: Scene) -> None:
    left = len(scene.origin.left)
    (connection,) = fetching(scene)
    wait_for("it is counted", lambda: waited_for(scene.node) == 1, 10)
    connection.close()
    wait_for("the origin is left", lambda: len(scene.origin.left) > left, 10)
    wait_for("it is counted no more", lambda: waited_for(scene.node) == 0, 10)
    assert said(ask(scene.node.url, CHATS["one"])) == scene.answers["one"]


# --- hostile ones --------------------------------------------------------------------------------------------------------


def representative(scene: Scene) -> list[Hostile]:
    """Of each kind, by what it meets: the frontend, the agent, the engine."""
    found = [*media.damaged(), *media.no_images(), *media.data_urls(16 << 20)]
    found += [*media.files(scene.allowed), *media.urls(), *media.fetched(scene.origin, scene.allowed)]
    known = lambda each: isinstance(each, str) and each.isascii()  # noqa: E731 - JSON of a client has these only
    return [case for case in found if all(map(known, case.references))]


WRITTEN = {
    "a placeholder beside an image": [image(1), text("x <|image_pad|> y")],
    "a placeholder before an image": [text("x <|image_pad|> y"), image(1)],
    "a whole place beside an image": [image(1), text("<|vision_start|><|image_pad|><|vision_end|>")],
    "two in one place": [text("<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"), image(1)],
    "another kind's": [image(1), text("<|video_pad|>")],
    "another model's": [image(1), text("<image>")],
    "no image": [text("x <|image_pad|> y")],
    "no image, in a string": "x <|vision_start|><|image_pad|><|vision_end|>",
}


def test_what_hostile_clients_send_is_a_400_and_costs_nobody_else(scene: Scene) -> None:
    url, node = scene.node.url, scene.node
    pids = {name: node.pid(name) for name in GROWTH_MB}
    before = {name: psutil.Process(pid).memory_info().rss >> 20 for name, pid in pids.items()}
    for pid in pids.values():
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM begins here
    cases: dict[str, tuple[Any, bool]] = {name: (content, False) for name, content in WRITTEN.items()}
    for case in representative(scene):
        cases[case.name] = ([*map(media.part, case.references), text()], case.passes)
    cases["10,000 images"] = ([media.part("https://pictures.example/a.png")] * 10_000, False)
    cases["a video"] = ([{"type": "video_url", "video_url": {"url": media.url(b"x", "video/mp4")}}, text()], False)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for name, answer in pool.map(lambda name: (name, ask(url, cases[name][0])), cases):
            if not (answer.status_code == 200 and cases[name][1]):  # flipped bits may do no harm
                assert 400 <= answer.status_code < 500, (name, answer.status_code, answer.text[:500])
                assert answer.json()["message"], (name, answer.text[:500])
    peak = {name: peak_of(pid) for name, pid in pids.items()}
    print(f"{len(cases)} cases; MB before {before}, at the peak {peak}")
    for name, most in GROWTH_MB.items():
        assert peak[name] - before[name] < most, name
    assert {name: node.pid(name) for name in GROWTH_MB} == pids
    wait_for("no request is left", lambda: waited_for(node) == node.status()["inflight"] == 0, 10)
    assert (node.status()["incarnation"], node.status()["state"]) == (1, "ready")
    assert {name: said(ask(url, content)) for name, content in CHATS.items()} == scene.answers


def peak_of(pid: int) -> int:
    """MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) >> 10


def test_a_damaged_image_is_named_to_the_client(scene: Scene) -> None:
    answer = ask(scene.node.url, [image(1), media.part(media.url(media.cut(media.good(2, "JPEG"), 0.7))), text()])
    assert answer.status_code == 400
    assert "image 2: damaged: image file is truncated" in answer.text, answer.text[:500]


# --- two engines ---------------------------------------------------------------------------------------------------------


def test_prefill_and_decode_answer_as_one(scene: Scene, vision: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    env = {**ENGINE, "DYN_FILE_KV": str(store)}
    arguments = [str(vision), "--served-model-name", MODEL, *CPU, "--no-frontend", "--disaggregation-mode"]
    with (
        Node(*arguments, "prefill", name="prefill", env=env) as prefill,
        Node(*arguments, "decode", name="decode", env=env) as decode,
        Frontend(store, 0) as frontend,
    ):
        for node in (prefill, decode):
            node.start()
        for node in (prefill, decode):
            node.wait_ready(240)
        frontend.wait_model(MODEL)
        wait_for("a request through both", lambda: ask(frontend.url, [text()]).status_code == 200, 60, every=0.2)
        assert {name: said(ask(frontend.url, content)) for name, content in CHATS.items()} == scene.answers
        cut = ask(frontend.url, [media.part(media.url(media.cut(media.good(1), 0.5))), text()])
        assert cut.status_code == 400 and "damaged" in cut.text, cut.text[:500]
        assert said(ask(frontend.url, CHATS["one"])) == scene.answers["one"]
        assert [node.status()["incarnation"] for node in (prefill, decode)] == [1, 1]


# --- the end -------------------------------------------------------------------------------------------------------------


def test_a_drain_waits_for_what_is_fetched_and_no_longer_when_its_clients_have_gone(scene: Scene) -> None:
    """Last: the node is gone afterwards."""
    connections = fetching(scene, 2)
    scene.node.terminate()
    wait_for("the drain", lambda: "streams left" in str(scene.node.status().get("reason")), 20)
    for connection in connections:
        connection.close()
    assert scene.node.wait_stopped(30) == 0
