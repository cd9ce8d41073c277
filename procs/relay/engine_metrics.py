"""SGLang's own metrics, ``sglang:*``, read from its multiprocess directory without importing SGLang."""

from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from procs.relay.text import labelled
from shared.config import NodeConfig
from shared.frames import Beat

PREFIX = "sglang:"


def render(config: NodeConfig, engine: Beat | None) -> str:
    """Prometheus text with Dynamo's auto-labels; empty without --enable-metrics or without an engine."""
    if not config.enable_metrics or engine is None:
        return ""
    directory = config.path / "tmp" / str(engine.incarnation) / "metrics"
    found = sorted({path.parent for path in directory.rglob("*.db")})
    if not found:
        return ""
    dynamo = config.dynamo
    labels = {
        "dynamo_namespace": dynamo.namespace,
        "dynamo_component": dynamo.component,
        "dynamo_endpoint": dynamo.endpoint,
        "model": config.served_model_name,
        "model_name": config.served_model_name,
    }
    return "".join(_text(path, labels) for path in found)


def _text(directory: Path, labels: dict[str, str]) -> str:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(directory))
    lines = []
    for line in generate_latest(registry).decode().splitlines():
        if line.startswith("#"):
            if line.split(" ", 3)[2].startswith(PREFIX):
                lines.append(line)
        elif line.startswith(PREFIX):
            lines.append(labelled(line, labels))
    return "\n".join(lines) + "\n"
