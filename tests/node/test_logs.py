"""Logs of one node: JSON lines of every process, a request found by one id, its spans, and disks that are full."""

import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.collector import Collector
from tests.disks import fill, tmpfs
from tests.harness import Node, nothing_left, running, send, wait_for
from tests.node.conftest import MODEL
from tests.streams import FOREVER, Streams

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
Figures = Callable[..., None]
RUNTIME_BYTES, LOG_BYTES = "4m", "1m"


@pytest.fixture(scope="module")
def node(model: Path, collector: Collector) -> Iterator[Node]:
    """Two agents, JSON lines, spans; its runtime directory is one small tmpfs, its log directory another one in it."""
    flags = ("--agents", "2", "--log-format", "jsonl", "--drain-grace", "0.2")
    with Node(str(model), "--served-model-name", MODEL, "--synthetic", "step_seconds=0.01", *flags) as made:
        made.environment |= {**collector.environment, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        log = made.runtime_dir / "log"
        made.runtime_dir.mkdir(mode=0o700)
        with tmpfs(made.runtime_dir, RUNTIME_BYTES):
            log.mkdir(mode=0o700)
            with tmpfs(log, LOG_BYTES):
                try:
                    yield made.start().wait_ready(40)
                finally:
                    made.close()


def lines(node: Node, process: str) -> list[dict[str, Any]]:
    """A log's lines; a process may be in the middle of its last one. supervisord's first are from before it has our plugin."""
    text = (node.runtime_dir / "log" / f"{process}.log").read_text()
    whole = text[: text.rfind("\n") + 1].splitlines()
    if process == "supervisord":
        whole = whole[next(number for number, line in enumerate(whole) if line.startswith("{")) :]
    return [json.loads(line) for line in whole]


def answers(node: Node) -> bool:
    body = {"model": MODEL, "prompt": "one fox", "max_tokens": 1}
    return requests.post(f"{node.url}/v1/completions", json=body, timeout=30).status_code == 200


def complete(node: Node, request_id: str) -> None:
    body = {"model": MODEL, "prompt": "one fox", "max_tokens": 3, "ignore_eos": True}
    answer = requests.post(f"{node.url}/v1/completions", json=body, headers={"x-request-id": request_id}, timeout=30)
    assert answer.status_code == 200, answer.text


def test_every_process_writes_json_lines_of_one_form(node: Node) -> None:
    for process in ("coordinator", "relay", "engine", "prober", "agent-0", "agent-1", "frontend", "supervisord"):
        for line in lines(node, process):
            assert {"time", "level", "message"} <= set(line), (process, line)
            assert line["level"] in ("DEBUG", "INFO", "WARN", "ERROR", "CRITICAL"), line
    ready = [line for line in lines(node, "engine") if line["message"].startswith("ready: incarnation 1")]
    assert [(line["process"], line["node"], line["incarnation"]) for line in ready] == [("engine", "test", 1)]
    registered = [line for line in lines(node, "agent-1") if line["message"].startswith("registered")]
    assert [(line["process"], line["incarnation"]) for line in registered] == [("agent:1", 1)]


def test_one_id_finds_a_request_in_frontend_agent_and_engine(node: Node, collector: Collector) -> None:
    said = node.sgnode("log-level", "engine", "debug")
    assert said.returncode == 0 and said.stdout == "engine: debug\n", said
    wait_for("the level", lambda: any(line["message"] == "log level: DEBUG" for line in lines(node, "engine")), 5)
    client = str(uuid.uuid4())
    complete(node, client)

    def found(process: str, word: str) -> list[dict[str, Any]]:
        return [line for line in lines(node, process) if word in json.dumps(line)]

    def ours() -> list[dict[str, Any]]:
        agents = [line for name in ("agent-0", "agent-1") for line in found(name, client)]
        return [line for line in agents if line["message"].startswith("Submitted SGLang Request ID")]

    [agent] = wait_for("the agent's line", ours, 5)
    assert agent["x_request_id"] == client
    request_id, rid = agent["request_id"], agent["rid"]
    assert [line for line in found("frontend", request_id) if line["x_request_id"] == client]
    [engine] = wait_for("the engine's line", lambda: found("engine", request_id), 5)
    assert (engine["request_id"], engine["rid"]) == (request_id, rid)
    assert engine["message"] == f"New SGLang Request ID: {rid}, Context: {request_id}"
    # The spans have the same trace as the agent's line.
    names = {"handle_payload", "sgnode.request"}
    trace = agent["trace_id"]

    def spans() -> dict[str, Any] | None:
        mine = {span.name: span for span in collector.spans if span.trace == trace}
        return mine if names < set(mine) else None

    by_name = wait_for("spans of frontend and agent", spans, 10)
    request = by_name["sgnode.request"]
    assert request.parent == by_name["handle_payload"].id and request.attributes["gen_ai.request.id"] == rid
    assert request.attributes["gen_ai.usage.completion_tokens"] == 3 and request.events == ["first token"]
    ids = {span.id for span in by_name.values()}
    roots = [span.name for span in by_name.values() if span.parent not in ids]
    assert len(roots) == 1 and request.attributes["gen_ai.response.finish_reasons"], (roots, by_name)


def test_a_full_log_disk_stops_nothing_and_is_said(node: Node, streams: Streams, figures: Figures) -> None:
    log = node.runtime_dir / "log"
    results = streams.start(node.url, MODEL, 8, 400)  # 4 s
    streams.flowing(results)
    filler = fill(log)
    complete(node, str(uuid.uuid4()))  # makes every process write

    def trouble() -> str:
        return str(node.status().get("logs"))

    wait_for("the status says so", lambda: f"log files can't be written: No space left on device: {log}" in trouble(), 10)
    assert "make room there" in node.sgnode("status").stdout
    send(dead := node.pid("agent:1"), signal.SIGKILL)
    wait_for("agent:1 is back", lambda: node.pid("agent:1") != dead and node.process_row("agent:1")["state"] == "ready", 30)
    wait_for("the frontend has both again", lambda: all(answers(node) for _ in range(4)), 20)
    more = streams.start(node.url, MODEL, 4, 100)
    streams.flowing(more)
    drained = node.sgnode("drain")
    assert drained.returncode == 0, drained
    streams.join(60)
    assert all(result.complete for result in more), more
    lost = [result for result in results if not result.complete]  # agent:1's, without a frontend that migrates
    assert len(lost) < len(results), lost[:1]
    assert node.sgnode("resume").returncode == 0
    node.wait_ready(20)
    filler.unlink()
    wait_for("logs go on", lambda: trouble() == "", 10)
    complete(node, request_id := str(uuid.uuid4()))
    wait_for("the request's line", lambda: any(request_id in json.dumps(lines(node, name)) for name in ("agent-0", "agent-1")), 5)
    missing = [
        line for name in ("agent-0", "coordinator") for line in lines(node, name) if "bytes are missing here" in line["message"]
    ]
    assert missing and all(line["process"] == "supervisord" for line in missing)
    assert node.console.read_text().count("log files can't be written") == 1
    figures(streams=len(results) + len(more), lost=len(lost))


def test_a_full_runtime_directory_stops_no_stream_and_the_engine_starts_again(
    node: Node, streams: Streams, figures: Figures
) -> None:
    results = streams.start(node.url, MODEL, 8, 300)  # 3 s
    streams.flowing(results)
    filler = fill(node.runtime_dir)
    refused = node.sgnode("log-level", "relay", "debug")
    assert refused.returncode in (0, 2) and "Traceback" not in refused.stderr, refused
    new = streams.start(node.url, MODEL, 4, 20)
    streams.join(30)
    assert all(result.complete for result in results + new), streams.results
    send(node.pid("engine"), signal.SIGKILL)
    at = time.monotonic()
    wait_for("the next engine", lambda: node.status().get("incarnation") == 2 and node.status()["state"] == "ready", 30)
    back = time.monotonic() - at
    complete(node, str(uuid.uuid4()))
    send(node.pid("agent:1"), signal.SIGKILL)

    def says() -> bool:
        fill(node.runtime_dir)  # what the dead left is removed, which makes room
        return "No space" in node.process_row("agent:1")["detail"]

    wait_for("agent:1 says why", says, 20, every=0.1)
    complete(node, str(uuid.uuid4()))
    filler.unlink()
    wait_for("agent:1 is back", lambda: node.process_row("agent:1")["state"] == "ready", 30)
    figures(engine_back_s=round(back, 2))


def test_a_collector_that_is_gone_holds_neither_streams_nor_the_stop(
    node: Node, collector: Collector, streams: Streams, figures: Figures
) -> None:
    collector.stop()
    results = streams.start(node.url, MODEL, 4, FOREVER)
    streams.flowing(results)
    running(node, 4)
    at = time.monotonic()
    node.terminate()
    wait_for("draining", lambda: node.status().get("state") == "draining", 5)
    node.terminate()  # at once
    assert node.wait_stopped(20) == 0
    figures(stop_s=round(time.monotonic() - at, 2))
    nothing_left(node)
