"""Prefill and decode in two real engines, the KV cache over mooncake's TCP: equal answers, drains, deaths, cancellation."""

import concurrent.futures
import http.client
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
import requests

from tests import aborts
from tests.e2e.conftest import MODEL, NEW_TOKENS, PROMPTS
from tests.frontend import Frontend
from tests.harness import CPU, ONE_THREAD, Deadline, Node, instances, model_cards, send, wait_for
from tests.streams import Streams

STREAMS = 8
DEADLINE_SECONDS = 0.5
"""From a death to the client's error (design: engine death)."""
HANDLED_SECONDS = 2.0
"""What this machine may add while a killed engine and its successor share two cores with everything else."""


@dataclass
class Pair:
    """A prefill and a decode node behind frontends that don't migrate and that do."""

    store: Path
    prefill: Node
    decode: Node
    failing: Frontend
    migrating: Frontend

    def whole(self, prefill: int = 1, decode: int = 1) -> None:
        """Wait until both serve, in at least that incarnation, and the frontends know it."""
        for node, life in ((self.prefill, prefill), (self.decode, decode)):
            wait_for(f"incarnation {life} of {node.name}", partial(_lives, node, life), 30)
            node.wait_ready(240)
        wait_for("both workers", lambda: len(instances(self.decode, self.store)) == 2, 20)

        last = ""

        def answers() -> bool:
            nonlocal last
            answer = complete(self.failing.url, [20, 30], 2)
            last = answer.text
            return answer.status_code == 200

        try:
            wait_for("a request that goes through both", answers, 60, every=0.2)
        except Deadline as error:
            said = [f"{node.name}: {json.dumps(node.status())}\n{node.logs()}" for node in (self.prefill, self.decode)]
            raise AssertionError("\n".join([f"{error}; the last answer: {last}", *said])) from error


def complete(url: str, prompt: list[int], tokens: int) -> requests.Response:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    return requests.post(f"{url}/v1/completions", json={**body, "return_tokens_as_token_ids": True}, timeout=60)


def tokens_of(answer: requests.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return [int(token.removeprefix("token_id:")) for token in answer.json()["choices"][0]["logprobs"]["tokens"]]


def scheduler(node: Node) -> int:
    """The pid of the engine's scheduler."""
    children = psutil.Process(node.pid("engine")).children(recursive=True)
    return next(child.pid for child in children if "scheduler" in " ".join(child.cmdline()))


def _lives(node: Node, incarnation: int) -> bool:
    """What the status says just after a death is still the life before."""
    return int(node.status().get("incarnation") or 0) >= incarnation


def inflight(node: Node) -> int:
    return int(node.status().get("inflight") or 0)


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    store = tmp_path_factory.mktemp("pair") / "store"
    # A cancelled request that prefill's scheduler had not read when decode gave it up is prefill's for so long.
    env = {"DYN_FILE_KV": str(store), "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "20", **ONE_THREAD}
    arguments = [str(model), "--served-model-name", MODEL, *CPU, "--no-frontend", "--disaggregation-mode"]
    with (
        Node(*arguments, "prefill", name="prefill", env=env) as prefill,
        Node(*arguments, "decode", name="decode", env=env) as decode,
        Frontend(store, 0) as failing,
        Frontend(store, 3) as migrating,
    ):
        prefill.start()
        decode.start()
        for node in (prefill, decode):
            node.wait_ready(240)
        made = Pair(store, prefill, decode, failing.wait_model(MODEL), migrating.wait_model(MODEL))
        made.whole()
        yield made


def test_the_answers_equal_one_engine_called_directly(pair: Pair, reference: list[list[int]]) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda prompt: tokens_of(complete(pair.failing.url, prompt, NEW_TOKENS)), PROMPTS))
    assert found == reference
    counted = complete(pair.failing.url, PROMPTS[-1], NEW_TOKENS).json()["usage"]
    assert (counted["prompt_tokens"], counted["completion_tokens"]) == (len(PROMPTS[-1]), NEW_TOKENS)


def test_several_samples_are_refused(pair: Pair) -> None:
    body = {"model": MODEL, "prompt": [20, 30], "max_tokens": 2, "n": 2, "temperature": 0.5}
    answer = requests.post(f"{pair.failing.url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 400 and "n=1" in answer.text


def test_each_role_says_so(pair: Pair) -> None:
    assert (pair.prefill.status()["role"], pair.decode.status()["role"]) == ("prefill", "decode")
    text = json.dumps(model_cards(pair.store))
    assert '"bootstrap_host": "127.0.0.1"' in text, text[:2000]


def test_cancelled_while_it_waits_for_its_prefill(pair: Pair) -> None:
    """The transfer can't happen: prefill's scheduler is stopped."""
    stopped = scheduler(pair.prefill)
    send(stopped, signal.SIGSTOP)
    try:
        found = aborts.delays(pair.decode, 5, lambda: _close_unanswered(pair))
        aborts.prompt("aborts in decode that wait for a transfer", found)
        wait_for("decode has let them go", lambda: inflight(pair.decode) == 0, 10)
    finally:
        send(stopped, signal.SIGCONT)
    wait_for("prefill has let them go", lambda: inflight(pair.prefill) == 0, 30)


def _close_unanswered(pair: Pair) -> None:
    connection = http.client.HTTPConnection(pair.failing.url.removeprefix("http://"))
    body = {"model": MODEL, "prompt": [20, 30, 40], "max_tokens": 20, "stream": True}
    known = aborts.submitted(pair.decode)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    wait_for("it is submitted", lambda: aborts.submitted(pair.decode) > known, 20, every=0.002)
    connection.close()


def test_cancelled_in_decode(pair: Pair) -> None:
    body = {"model": MODEL, "prompt": [20, 30, 40], "max_tokens": 3000, "ignore_eos": True, "stream": True}
    answer = requests.post(f"{pair.failing.url}/v1/completions", json=body, stream=True, timeout=60)
    lines = answer.iter_lines()
    assert next(lines)
    aborts.prompt("aborts in decode", aborts.delays(pair.decode, 1, answer.close))
    wait_for("decode has let it go", lambda: inflight(pair.decode) == 0, 10)


def _held(pair: Pair, streams: Streams, url: str) -> int:
    """Streams whose KV cache can't come: prefill's scheduler, which is returned, is stopped."""
    stopped = scheduler(pair.prefill)
    send(stopped, signal.SIGSTOP)
    streams.start(url, MODEL, STREAMS, 20)
    wait_for("the requests at both engines", lambda: min(inflight(pair.prefill), inflight(pair.decode)) >= STREAMS, 30)
    return stopped


def test_a_killed_prefill_ends_what_waits_for_it_and_decode_goes_on(pair: Pair) -> None:
    streams = Streams()
    running = streams.start(pair.failing.url, MODEL, 2, 1500)
    streams.flowing(running)
    waiting = Streams()
    stopped = _held(pair, waiting, pair.failing.url)
    died = time.monotonic()
    send(stopped, signal.SIGKILL)
    results = waiting.join(30)
    assert all(result.error and "503" in result.error for result in results), results[0]
    print(f"a killed prefill: clients' errors after {max(result.ended for result in results) - died:.3f} s")
    assert max(result.ended for result in results) - died < DEADLINE_SECONDS + HANDLED_SECONDS
    wait_for("decode holds only what ran before", lambda: inflight(pair.decode) <= 2, 10)
    assert all(result.complete for result in streams.join(120)), "what decode had already goes on"
    assert pair.decode.status()["incarnation"] == 1 and pair.decode.status()["state"] == "ready"
    pair.whole(prefill=2)


def test_a_killed_decode_ends_its_streams_and_prefill_goes_on(pair: Pair) -> None:
    streams = Streams()
    results = streams.start(pair.failing.url, MODEL, STREAMS, 3000)
    streams.flowing(results)
    incarnation = pair.prefill.status()["incarnation"]
    died = time.monotonic()
    send(scheduler(pair.decode), signal.SIGKILL)
    streams.join(30)
    assert all(result.error and "503" in result.error for result in results), results[0]
    print(f"a killed decode: clients' errors after {max(result.ended for result in results) - died:.3f} s")
    assert max(result.ended for result in results) - died < DEADLINE_SECONDS + HANDLED_SECONDS
    assert pair.prefill.status()["incarnation"] == incarnation and pair.prefill.status()["state"] == "ready"
    pair.whole(decode=2)


def test_sigterm_on_prefill_waits_for_its_transfers(pair: Pair) -> None:
    """Last: the prefill node is gone afterwards."""
    streams = Streams()
    stopped = _held(pair, streams, pair.failing.url)
    pair.prefill.terminate()
    wait_for("the drain", lambda: "streams left" in str(pair.prefill.status().get("reason")), 20)
    send(stopped, signal.SIGCONT)
    assert all(result.complete for result in streams.join(60)), [r.error for r in streams.results]
    assert pair.prefill.wait_stopped(60) == 0
    assert pair.decode.status()["state"] == "ready"
