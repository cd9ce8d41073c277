"""Encode, prefill and decode in three nodes: equal answers, deaths in the middle of a transfer, clients that go, drains."""

import concurrent.futures
import http.client
import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.e2e.conftest import MODEL
from tests.e2e.test_disagg import DEADLINE_SECONDS, HANDLED_SECONDS, inflight, scheduler
from tests.e2e.test_media import CHATS, ENGINE, TOKENS, answered_directly, ask, body, image, said, streamed, text
from tests.frontend import Frontend
from tests.harness import CPU, Deadline, Node, instances, nothing_left, send, wait_for

HELD = 4
"""Requests whose transfer is held."""
PARTS = ("encode", "prefill", "decode")
NUMBERS = range(100, 100 + HELD)


@dataclass
class Trio:
    store: Path
    nodes: dict[str, Node]
    frontend: Frontend
    """Does not migrate: a client sees what would be continued elsewhere."""
    answers: dict[str, str]

    def whole(self, **lives: int) -> None:
        """Wait until all serve, in at least these incarnations, and know of each other."""
        for name, node in self.nodes.items():
            life = lives.get(name, 1)
            wait_for(f"incarnation {life} of {name}", partial(_lives, node, life), 30)
            node.wait_ready(240)
        wait_for("three workers", lambda: len(instances(self.nodes["encode"], self.store)) == len(PARTS), 20)
        last = ""

        def answers() -> bool:
            nonlocal last
            answer = ask(self.frontend.url, CHATS["one"])
            last = answer.text[:500]
            return answer.status_code == 200

        try:
            wait_for("a request that goes through all three", answers, 60, every=0.2)
        except Deadline as error:
            logs = [f"{name}: {json.dumps(node.status())}\n{node.logs()}" for name, node in self.nodes.items()]
            raise AssertionError("\n".join([f"{error}; the last answer: {last}", *logs])) from error

    def free(self) -> None:
        """No engine has a request, and no embeddings are left in shared memory."""
        for name, node in self.nodes.items():
            wait_for(f"{name} has let them go", partial(_idle, node), 10)
        wait_for("no embeddings left", lambda: not self.embeddings(), 10)

    def embeddings(self) -> list[Path]:
        """Those that the encode node's engine has put into shared memory."""
        marks = [path.read_text() for path in (self.nodes["encode"].runtime_dir / "tmp").glob("*/shm-mark")]
        return [file for mark in marks for file in Path("/dev/shm").glob(f"encoder_cache.*{mark}*")]


@dataclass
class Outcome:
    status: int
    error: str
    chunks: int
    finish: str
    ended: float

    @property
    def complete(self) -> bool:
        return self.status == 200 and self.finish == "length" and not self.error


def stream(url: str, number: int) -> Outcome:
    """A picture of its own number, streamed."""
    sent = body([image(number), text()], stream=True)
    answer = requests.post(f"{url}/v1/chat/completions", json=sent, stream=True, timeout=120)
    if answer.status_code != 200:
        return Outcome(answer.status_code, answer.text[:300], 0, "", time.monotonic())
    error, chunks, finish, event = "", 0, "", b""
    for line in answer.iter_lines():
        if line.startswith(b"event: "):
            event = line[7:]
        elif event == b"error" and line:
            error = line.decode()[:300]
        elif line.startswith(b"data: {"):
            said = json.loads(line[6:])
            chunks += 1
            error = error or json.dumps(said.get("error") or "").strip('"')
            for choice in said.get("choices") or []:
                finish = choice.get("finish_reason") or finish
    return Outcome(200, error, chunks, finish, time.monotonic())


def _lives(node: Node, incarnation: int) -> bool:
    """What the status says just after a death is still the life before."""
    return int(node.status().get("incarnation") or 0) >= incarnation


def _idle(node: Node) -> bool:
    return inflight(node) == 0


def _drains(node: Node) -> bool:
    return "streams left" in str(node.status().get("reason"))


@pytest.fixture(scope="module")
def trio(vision: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    store = tmp_path_factory.mktemp("trio") / "store"
    env = {"DYN_FILE_KV": str(store), **ENGINE}
    arguments = [str(vision), "--served-model-name", MODEL, *CPU, "--no-frontend", "--enable-multimodal"]
    arguments += ["--embedding-transfer-mode", "local", "--disaggregation-mode"]
    dedicated = {"encode": [], "prefill": ["--dedicated-mm-encoder"], "decode": ["--dedicated-mm-encoder"]}
    with (
        Node(*arguments, "encode", *dedicated["encode"], name="encode", env=env) as encode,
        Node(*arguments, "prefill", *dedicated["prefill"], name="prefill", env=env) as prefill,
        Node(*arguments, "decode", *dedicated["decode"], name="decode", env=env) as decode,
        Frontend(store, 0) as frontend,
    ):
        nodes = dict(zip(PARTS, (encode, prefill, decode), strict=True))
        for node in nodes.values():
            node.start()
        answers = answered_directly(vision, tmp_path_factory.mktemp("direct"))
        for node in nodes.values():
            node.wait_ready(240)
        made = Trio(store, nodes, frontend.wait_model(MODEL), answers)
        made.whole()
        yield made


def test_answers_equal_one_engine_s_streamed_and_not_one_by_one_and_together(trio: Trio) -> None:
    url = trio.frontend.url
    assert {name: said(ask(url, content)) for name, content in CHATS.items()} == trio.answers
    assert {name: streamed(url, content)[0] for name, content in CHATS.items()} == trio.answers
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda content: said(ask(url, content)), [*CHATS.values()] * 3))
    assert found == [*trio.answers.values()] * 3
    trio.free()


def test_each_says_what_it_is_and_usage_counts_the_tokens_of_the_picture(trio: Trio) -> None:
    assert [node.status()["role"] for node in trio.nodes.values()] == ["mm_encode", "mm_prefill", "mm_decode"]
    plain = ask(trio.frontend.url, CHATS["no image"]).json()["usage"]["prompt_tokens"]
    usage = ask(trio.frontend.url, CHATS["one"]).json()["usage"]
    assert usage["prompt_tokens"] == plain + 12 + 2 and usage["completion_tokens"] == TOKENS


def test_what_can_not_be_served_is_the_client_s_error(trio: Trio) -> None:
    url = trio.frontend.url
    refused = {
        "n=1": ask(url, CHATS["one"], n=2, temperature=0.5),
        "placeholders": ask(url, [image(1), text("x <|image_pad|> y")]),
        "damaged": ask(url, [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, text()]),
    }
    for words, answer in refused.items():
        assert answer.status_code == 400 and words in answer.text, answer.text
    trio.free()


def hold(trio: Trio, pid: int, begin: Callable[[int], Any]) -> list[Any]:
    """Requests that have reached all three engines, the process of whose prefill is stopped."""
    send(pid, signal.SIGSTOP)
    begun = [begin(number) for number in NUMBERS]
    wait_for("the requests wait in decode", lambda: inflight(trio.nodes["decode"]) >= HELD, 30)
    return begun


@pytest.mark.parametrize("part", PARTS)
def test_a_killed_engine_ends_what_waits_for_embeddings_and_the_others_go_on(trio: Trio, part: str) -> None:
    """Prefill's engine is stopped before it can fetch them."""
    lives = {name: int(node.status()["incarnation"]) for name, node in trio.nodes.items()}
    receiver, victim = trio.nodes["prefill"].pid("engine"), trio.nodes[part].pid("engine")
    with concurrent.futures.ThreadPoolExecutor(HELD) as pool:
        waiting = hold(trio, receiver, lambda number: pool.submit(stream, trio.frontend.url, number))
        assert len(trio.embeddings()) == HELD
        died = time.monotonic()
        send(victim, signal.SIGKILL)
        results = [future.result(30) for future in waiting]
    try:
        assert all("503" in f"{result.status} {result.error}" for result in results), results
        last = max(result.ended for result in results) - died
        print(f"a killed {part}: clients' errors after {last:.3f} s")
        assert last < DEADLINE_SECONDS + HANDLED_SECONDS
    finally:
        if part != "prefill":
            send(receiver, signal.SIGCONT)
    trio.free()
    others = {name: life for name, life in lives.items() if name != part}
    assert {name: trio.nodes[name].status()["incarnation"] for name in others} == others
    trio.whole(**{**lives, part: lives[part] + 1})


def test_a_client_that_goes_takes_its_embeddings_along(trio: Trio) -> None:
    host = trio.frontend.url.removeprefix("http://")

    def begin(number: int) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(host)
        sent = json.dumps(body([image(number), text()], stream=True))
        connection.request("POST", "/v1/chat/completions", sent, {"Content-Type": "application/json"})
        return connection

    stopped = trio.nodes["prefill"].pid("engine")
    connections = hold(trio, stopped, begin)
    try:
        for connection in connections:
            connection.close()
        wait_for("no embeddings left", lambda: not trio.embeddings(), 10)
    finally:
        send(stopped, signal.SIGCONT)
    trio.free()
    trio.whole()


def test_sigterm_on_all_three_loses_nothing(trio: Trio) -> None:
    """Last: the nodes are gone afterwards. Their KV caches can't be handed over while prefill's scheduler is stopped."""
    stopped = scheduler(trio.nodes["prefill"])
    with concurrent.futures.ThreadPoolExecutor(HELD) as pool:
        waiting = hold(trio, stopped, lambda number: pool.submit(stream, trio.frontend.url, number))
        try:
            for node in trio.nodes.values():
                node.terminate()
            for name, node in trio.nodes.items():
                wait_for(f"the drain of {name}", partial(_drains, node), 20)
        finally:
            send(stopped, signal.SIGCONT)
        results = [future.result(60) for future in waiting]
    assert all(result.complete for result in results), results
    for node in trio.nodes.values():
        assert node.wait_stopped(60) == 0
        nothing_left(node)
    assert not trio.embeddings()
