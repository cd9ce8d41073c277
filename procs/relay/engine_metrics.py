"""SGLang's own metrics, ``sglang:*``, read from its multiprocess directory without importing SGLang."""

import re
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from shared.config import NodeConfig
from shared.frames import Beat

PREFIX = "sglang:"
SAMPLE = re.compile(r"^([^\s{]+)(?:\{(.*)\})?( .*)$")


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
            lines.append(_labelled(line, labels))
    return "\n".join(lines) + "\n"


def _labelled(line: str, labels: dict[str, str]) -> str:
    """Add the labels that the sample doesn't have: those of the source win (dynamo.common.utils.prometheus)."""
    match = SAMPLE.match(line)
    if match is None:
        return line
    name, own, rest = match.groups()
    more = ",".join(f'{key}="{_escape(value)}"' for key, value in labels.items() if not own or f'{key}="' not in own)
    joined = ",".join(part for part in (own, more) if part)
    return f"{name}{{{joined}}}{rest}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
