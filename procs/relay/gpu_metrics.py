"""Memory and load of the GPUs that the node uses, ``sgnode_gpu_*``; nothing without a GPU."""

import os
import time
from collections.abc import Callable

from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from shared import gpus
from shared.config import NodeConfig
from shared.gpus import Gpu, Gpus

RETRY_SECONDS = 60.0
"""Between two tries of a driver that doesn't answer."""
LABELS = ["gpu", "uuid"]


class GpuMetrics:
    """``families`` blocks for as long as the driver does."""

    def __init__(self, config: NodeConfig, find: Callable[[], Gpus | None] = gpus.find) -> None:
        self._ids = config.gpu_ids
        self._find = find
        self._gpus: Gpus | None = None
        self._ours: list[Gpu] = []
        self._try_at = 0.0

    def families(self) -> list[Metric]:
        if self._gpus is None and time.monotonic() >= self._try_at:
            self._try_at = time.monotonic() + RETRY_SECONDS
            if (found := self._find()) is not None:
                visible = found.visible(os.environ.get("CUDA_VISIBLE_DEVICES"))
                wanted = range(len(visible)) if self._ids is None else self._ids
                self._ours = [visible[number] for number in wanted if number < len(visible)]
                self._gpus = found
        if self._gpus is None:
            return []
        made = {
            "used_bytes": GaugeMetricFamily("sgnode_gpu_memory_used_bytes", "GPU memory in use, by whomever", labels=LABELS),
            "total_bytes": GaugeMetricFamily("sgnode_gpu_memory_total_bytes", "GPU memory there is", labels=LABELS),
            "utilization": GaugeMetricFamily(
                "sgnode_gpu_utilization_ratio", "Part of the last sample period in which a kernel ran, 0 to 1", labels=LABELS
            ),
            "temperature": GaugeMetricFamily("sgnode_gpu_temperature_celsius", "Temperature of the GPU's die", labels=LABELS),
            "watts": GaugeMetricFamily("sgnode_gpu_power_watts", "Power that the GPU draws", labels=LABELS),
        }
        for gpu in self._ours:
            reading = self._gpus.read(gpu)
            for field, family in made.items():
                if (value := getattr(reading, field)) is not None:
                    family.add_metric([str(gpu.index), gpu.uuid], value)
        return [family for family in made.values() if family.samples]
