"""The real engine's log lines, levels and spans: SGLang's processes follow what the node was asked for."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.collector import Collector, Span
from tests.e2e.conftest import MODEL
from tests.harness import CPU, ONE_THREAD, Node, wait_for


@pytest.fixture(scope="module")
def node(model: Path, collector: Collector) -> Iterator[Node]:
    flags = ["--enable-trace", "--otlp-traces-endpoint", f"127.0.0.1:{collector.port}", "--log-format", "jsonl"]
    quick = {"OTEL_BSP_SCHEDULE_DELAY": "100", **ONE_THREAD}
    with Node(str(model), "--served-model-name", MODEL, *CPU, *flags, env={**collector.environment, **quick}) as made:
        yield made.start().wait_ready()


def engine_lines(node: Node) -> tuple[list[dict[str, Any]], list[str]]:
    """JSON lines of the engine's process tree, and what is none."""
    found, others = [], []
    for line in (node.runtime_dir / "log" / "engine.log").read_text(errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            others.append(line)
    return found, others


def test_sglang_s_processes_write_json_lines_and_follow_a_level(node: Node) -> None:
    found, others = engine_lines(node)
    by_process = {line.get("process", line.get("target", "")) for line in found}
    assert {"keeper", "engine", "scheduler"} <= by_process, (by_process, others[:5])
    assert any(line.get("target", "").startswith("sglang") for line in found), found[:3]
    assert not [line for line in others if " INFO " in line or "Traceback" in line], others[:5]
    assert node.sgnode("log-level", "engine", "debug").returncode == 0

    def debug(process: str) -> list[dict[str, Any]]:
        return [line for line in engine_lines(node)[0] if line["level"] == "DEBUG" and line.get("process") == process]

    def ask() -> bool:
        return bool(complete(node)) and bool(debug("engine"))

    wait_for("the engine's debug lines", ask, 20, every=0.2)


def complete(node: Node) -> str:
    request_id = str(uuid.uuid4())
    body = {"model": MODEL, "prompt": "one fox", "max_tokens": 5, "ignore_eos": True}
    answer = requests.post(f"{node.url}/v1/completions", json=body, headers={"x-request-id": request_id}, timeout=60)
    assert answer.status_code == 200, answer.text
    return request_id


def test_one_trace_goes_through_frontend_agent_and_sglang(node: Node, collector: Collector) -> None:
    request_id = complete(node)

    def trace() -> list[Span] | None:
        ours = [span for span in collector.spans if span.name == "sgnode.request"]
        request = [span for span in ours if span.attributes.get("x_request_id") == request_id]
        mine = [span for span in collector.spans if request and span.trace == request[0].trace]
        # SGLang's inner spans end, and are sent, before the one that is a child of ours.
        whole = any(span.parent == request[0].id for span in mine)
        return mine if whole and {"sgnode", "sglang", "dynamo"} <= {span.service for span in mine} else None

    found = wait_for("spans of all", trace, 20, every=0.1)
    [request] = [span for span in found if span.name == "sgnode.request"]
    below = [span for span in found if span.parent == request.id]
    assert below and {span.service for span in below} == {"sglang"}, found
