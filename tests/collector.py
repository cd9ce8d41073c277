"""An OpenTelemetry collector of the test's own: takes spans over OTLP/gRPC, keeps them, and can be gone."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Span:
    """One span as it arrived; ids in hex, ``parent`` empty at a root, times in UNIX seconds."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    start: float
    end: float
    attributes: dict[str, Any]
    events: list[str]
    error: str


def _value(any_value: Any) -> Any:
    kind = any_value.WhichOneof("value")
    return getattr(any_value, kind) if kind else None


class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
    """Listens on a free port of 127.0.0.1 from ``with`` to its end."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    def Export(self, request: Any, _context: Any) -> Any:
        for resource in request.resource_spans:
            service = next((_value(each.value) for each in resource.resource.attributes if each.key == "service.name"), "")
            for scope in resource.scope_spans:
                self.spans += [_span(str(service), span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    @property
    def environment(self) -> dict[str, str]:
        """For a node: Dynamo's switch and endpoint."""
        return {"OTEL_EXPORT_ENABLED": "true", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{self.port}"}

    def stop(self) -> None:
        self._server.stop(None).wait(5)

    def __enter__(self) -> "Collector":
        self._server.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()


def _span(service: str, span: Any) -> Span:
    return Span(
        service=service,
        name=span.name,
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        start=span.start_time_unix_nano / 1e9,
        end=span.end_time_unix_nano / 1e9,
        attributes={each.key: _value(each.value) for each in span.attributes},
        events=[event.name for event in span.events],
        error=span.status.message if span.status.code == 2 else "",
    )
