"""This host's NVIDIA GPUs, as the driver's NVML has them (nvidia-ml-py, which SGLang requires)."""

import contextlib
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTROL_DEVICE = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class Gpu:
    """One GPU; ``index`` as `nvidia-smi` counts."""

    index: int
    uuid: str
    handle: Any


@dataclass(frozen=True)
class Reading:
    """What one GPU says now: bytes, degrees Celsius, watts; a ratio from 0 to 1. None: it doesn't say."""

    gpu: Gpu
    used_bytes: int | None
    total_bytes: int | None
    utilization: float | None
    temperature: float | None
    watts: float | None


class Gpus:
    """``pynvml``: the library, or what stands in for it. Raises what it raises when the driver doesn't answer."""

    def __init__(self, pynvml: Any) -> None:
        self._nvml = pynvml
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        self.all = [Gpu(index, self._ask("UUID", handle) or "", handle) for index, handle in enumerate(handles)]

    def _ask(self, what: str, *args: Any) -> Any:
        """None where a GPU has no answer: fallen off the bus, or not for its kind."""
        with contextlib.suppress(self._nvml.NVMLError):
            return getattr(self._nvml, f"nvmlDeviceGet{what}")(*args)
        return None

    def held(self, pids: Collection[int]) -> list[str]:
        """Words for each of these processes that holds memory: ``GPU 0: 71000 MiB by pid 4242``.

        NVML's pids are the host's: in another pid namespace none is ours.
        """
        return [
            f"GPU {gpu.index}: {(process.usedGpuMemory or 0) >> 20} MiB by pid {process.pid}"
            for gpu in self.all
            for process in self._ask("ComputeRunningProcesses", gpu.handle) or []
            if process.pid in pids
        ]

    def visible(self, devices: str | None) -> list[Gpu]:
        """Those that CUDA_VISIBLE_DEVICES names, in its order (CUDA C++ programming guide); None: all.

        What follows an entry that names none doesn't count. Not told apart: CUDA_DEVICE_ORDER other than the driver's, MIG.
        """
        if devices is None:
            return self.all
        found: list[Gpu] = []
        for entry in map(str.strip, devices.split(",")):
            named = [gpu for gpu in self.all if (entry == str(gpu.index) or (entry[:4] == "GPU-" and gpu.uuid.startswith(entry)))]
            if len(named) != 1:
                break
            found += named
        return found

    def read(self, gpu: Gpu) -> Reading:
        memory = self._ask("MemoryInfo", gpu.handle)
        rates = self._ask("UtilizationRates", gpu.handle)
        milliwatts = self._ask("PowerUsage", gpu.handle)
        return Reading(
            gpu,
            None if memory is None else memory.used,
            None if memory is None else memory.total,
            None if rates is None else rates.gpu / 100,
            self._ask("Temperature", gpu.handle, self._nvml.NVML_TEMPERATURE_GPU),
            None if milliwatts is None else milliwatts / 1000,
        )


def find() -> Gpus | None:
    """None without a GPU or its driver. Blocks: without the persistence daemon the driver takes a second."""
    if not CONTROL_DEVICE.exists():
        return None
    try:
        import pynvml  # type: ignore[import-not-found,unused-ignore]

        return Gpus(pynvml)
    except Exception as error:  # NVML's own errors have no common base outside of it
        logging.warning("NVML does not answer, nothing is known about GPU memory: %s", error)
        return None
