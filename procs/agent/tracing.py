"""An agent's spans: one a request, below Dynamo's ``handle_payload`` and above SGLang's, exported over OTLP.

Dynamo 1.6.1's own ``Context.start_span`` does nothing where a worker serves an endpoint by itself, as ours does. The exporter has
a thread; what a collector doesn't take in time is dropped, so neither a request nor a stop waits for it.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shared.errors import RequestError
from shared.frames import Output

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

ENABLED = "OTEL_EXPORT_ENABLED"
ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
NAME = "sgnode.request"
FLUSH_SECONDS = 1.0
"""For the last spans when the agent stops."""


class RequestSpan:
    """The span of one request. ``headers`` makes what the engine does its children."""

    def __init__(self, span: "Span", headers: dict[str, str]) -> None:
        self._span = span
        self._began = time.monotonic()
        self._tokens = 0
        self.headers = headers

    def submitted(self, rid: str) -> None:
        self._span.set_attribute("gen_ai.request.id", rid)

    def output(self, output: Output) -> None:
        if not self._tokens and output.token_ids:
            self._span.add_event("first token")
            self._span.set_attribute("gen_ai.latency.time_to_first_token", time.monotonic() - self._began)
        self._tokens += len(output.token_ids)
        if output.finish is not None:
            self._span.set_attribute("gen_ai.response.finish_reasons", [str(output.finish.get("type"))])

    def failed(self, error: BaseException) -> None:
        """A request that its client has left is no error."""
        from opentelemetry.trace import StatusCode

        if isinstance(error, GeneratorExit):
            self._span.add_event("client gone")
            return
        kind = str(error.code) if isinstance(error, RequestError) else type(error).__name__
        self._span.set_attribute("error.type", kind)
        self._span.set_status(StatusCode.ERROR, str(error) or kind)

    def end(self) -> None:
        self._span.set_attribute("gen_ai.usage.completion_tokens", self._tokens)
        self._span.end()


class Tracing:
    """The agent's tracer. ``exporter``: for tests; otherwise OTLP, as the variables say."""

    def __init__(self, agent: str, node: str, exporter: "SpanExporter | None" = None) -> None:
        """Raises ImportError when opentelemetry-sdk or the exporter of the protocol asked for is not installed."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        service = os.environ.get("OTEL_SERVICE_NAME", "sgnode")
        resource = Resource.create({"service.name": service, "service.instance.id": f"{node}/{agent}"})
        # The default sampler keeps to what the frontend has decided for a request.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or _exporter()))
        self._tracer: Tracer = self._provider.get_tracer("sgnode.agent")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, context_id: str, headers: Mapping[str, str] | None, prompt_tokens: int) -> RequestSpan:
        """``headers``: what Dynamo's context has of the trace."""
        from opentelemetry import trace

        attributes: dict[str, str | int] = {"request_id": context_id, "gen_ai.usage.prompt_tokens": prompt_tokens}
        if headers and "x-request-id" in headers:
            attributes["x_request_id"] = headers["x-request-id"]
        span = self._tracer.start_span(NAME, self._propagator.extract(dict(headers or {})), attributes=attributes)
        carried: dict[str, str] = {}
        self._propagator.inject(carried, trace.set_span_in_context(span))
        return RequestSpan(span, {**(headers or {}), **carried})

    def close(self) -> None:
        """Export what is left, for FLUSH_SECONDS at most; then it is lost."""
        worker = threading.Thread(target=self._provider.shutdown, daemon=True)
        worker.start()
        worker.join(FLUSH_SECONDS)


def make(agent: str, node: str) -> Tracing | None:
    """None unless Dynamo's OTEL_EXPORT_ENABLED is set; what is missing is said, and costs only the agent's own spans."""
    if os.environ.get(ENABLED, "").strip().lower() not in ("1", "true", "yes", "on"):
        return None
    # Each export that fails would be a line and a traceback; Dynamo's runtime says it as well.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    try:
        return Tracing(agent, node)
    except ImportError as error:
        logging.warning("%s is set, but the agents have no spans of their own: %s (install sgnode[otel])", ENABLED, error)
    return None


def prompt_tokens(request: dict[str, Any]) -> int:
    """0 where the engine tokenises."""
    tokens = request.get("token_ids")
    return len(tokens) if isinstance(tokens, list) else 0


def _exporter() -> "SpanExporter":
    protocol = next((os.environ[name] for name in PROTOCOLS if os.environ.get(name)), "grpc")
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter()
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

    endpoint = os.environ.get(ENDPOINT) or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or "http://localhost:4317"
    return GrpcExporter(endpoint=endpoint, insecure=not endpoint.startswith("https"))
