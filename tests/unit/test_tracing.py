"""The agents' spans: a child of Dynamo's, the engine's parent, and of no cost to a request or a stop."""

import asyncio
import time
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from procs.agent import tracing
from procs.agent.tracing import Tracing
from shared.errors import Code, RequestError
from shared.frames import Output

TRACE, PARENT = "78a647bf827fd1f412472828d8927885", "a6cf00680dc89ccf"


def headers(flags: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{TRACE}-{PARENT}-{flags}", "request-id": "ctx"}


def spans(made: Tracing, exporter: InMemorySpanExporter) -> list[Any]:
    made.close()
    return list(exporter.get_finished_spans())


def test_a_request_s_span_is_a_child_and_its_headers_make_children() -> None:
    exporter = InMemorySpanExporter()
    made = Tracing("agent:0", "gpu-7", exporter)
    span = made.begin("ctx", headers(), 12)
    span.submitted("ab" * 16)
    span.output(Output("ab" * 16, 0, [1, 2], None, None))
    span.output(Output("ab" * 16, 2, [3], {"type": "stop"}, None))
    span.end()
    [found] = spans(made, exporter)
    assert (f"{found.context.trace_id:032x}", f"{found.parent.span_id:016x}") == (TRACE, PARENT)
    assert span.headers == {"traceparent": f"00-{TRACE}-{found.context.span_id:016x}-01", "request-id": "ctx"}
    ttft = found.attributes["gen_ai.latency.time_to_first_token"]
    assert 0 <= ttft < 1 and [event.name for event in found.events] == ["first token"]
    assert {key: value for key, value in found.attributes.items() if not key.endswith("first_token")} == {
        "request_id": "ctx",
        "gen_ai.request.id": "ab" * 16,
        "gen_ai.usage.prompt_tokens": 12,
        "gen_ai.usage.completion_tokens": 3,
        "gen_ai.response.finish_reasons": ("stop",),
    }
    assert found.resource.attributes["service.instance.id"] == "gpu-7/agent:0" and found.status.is_unset


@pytest.mark.parametrize(
    ("error", "kind"), [(RequestError(Code.ENGINE_DEAD, "the engine died"), "engine_dead"), (KeyError("k"), "KeyError")]
)
def test_a_failure_is_in_the_span(error: Exception, kind: str) -> None:
    exporter = InMemorySpanExporter()
    made = Tracing("agent:0", "n", exporter)
    span = made.begin("ctx", None, 0)
    span.failed(error)
    span.end()
    [found] = spans(made, exporter)
    assert found.attributes["error.type"] == kind and not found.status.is_ok and found.parent is None


def test_a_client_that_goes_is_no_error() -> None:
    exporter = InMemorySpanExporter()
    made = Tracing("agent:0", "n", exporter)
    span = made.begin("ctx", headers(), 0)
    span.failed(GeneratorExit())
    span.end()
    [found] = spans(made, exporter)
    assert found.status.is_unset and [event.name for event in found.events] == ["client gone"]


def test_what_the_frontend_does_not_sample_is_not_exported() -> None:
    exporter = InMemorySpanExporter()
    made = Tracing("agent:0", "n", exporter)
    span = made.begin("ctx", headers("00"), 0)
    span.end()
    assert span.headers["traceparent"].endswith("-00") and spans(made, exporter) == []


def test_a_collector_that_hangs_holds_neither_the_loop_nor_the_stop() -> None:
    class Hangs(InMemorySpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            time.sleep(20)
            return SpanExportResult.FAILURE

    made = Tracing("agent:0", "n", Hangs())

    async def requests() -> float:
        worst = 0.0
        for _ in range(5000):  # more than the queue has room for
            began = time.perf_counter()
            made.begin("ctx", headers(), 1).end()
            worst = max(worst, time.perf_counter() - began)
        return worst

    assert asyncio.run(requests()) < 0.5
    began = time.monotonic()
    made.close()
    assert time.monotonic() - began < tracing.FLUSH_SECONDS + 0.5


def test_off_without_dynamo_s_switch_and_said_without_the_library(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(tracing.ENABLED, raising=False)
    assert tracing.make("agent:0", "n") is None
    monkeypatch.setenv(tracing.ENABLED, "true")
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.resources", None)
    assert tracing.make("agent:0", "n") is None and "have no spans of their own" in caplog.text
