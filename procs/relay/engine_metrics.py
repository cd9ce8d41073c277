"""SGLang's own metrics, ``sglang:*``, read from its multiprocess directory without importing SGLang."""

from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from procs.relay.text import Labels
from shared.config import NodeConfig
from shared.frames import Beat

PREFIX = "sglang:"


class EngineMetrics:
    """The engine's, once, however many agents hand requests to it."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._labels = Labels({})

    def render(self, engine: Beat | None, worker_id: str) -> str:
        """Prometheus text with Dynamo's auto-labels; empty without --enable-metrics or without an engine.

        ``worker_id``: decimal, of the worker that they are shown for; empty: none is known. Blocks. Raises OSError and
        ValueError while SGLang writes what is read here.
        """
        config = self._config
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
            **({"worker_id": f"{int(worker_id):x}"} if worker_id.isdigit() else {}),
            "model": config.served_model_name,
            "model_name": config.served_model_name,
        }
        if labels != self._labels.labels:
            self._labels = Labels(labels)
        return "".join(_text(path, self._labels) for path in found)


def _text(directory: Path, labels: Labels) -> str:
    _forget_dead(directory)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(directory))
    lines = []
    for line in generate_latest(registry).decode().splitlines():
        if line.startswith("#"):
            if line.split(" ", 3)[2].startswith(PREFIX):
                lines.append(line)
        elif line.startswith(PREFIX):
            lines.append(labels.add(line))
    return "\n".join(lines) + "\n"


def _forget_dead(directory: Path) -> None:
    """What a dead process counted stays counted; a gauge that is to be of living processes goes (prometheus_client's rule)."""
    for path in directory.glob("gauge_live*_*.db"):
        pid = path.stem.rpartition("_")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            mark_process_dead(int(pid), str(directory))
