"""GPU memory that dead processes still hold, as the driver's NVML has it. Without a GPU, or NVML, nothing is known to be held."""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

CONTROL_DEVICE = Path("/dev/nvidiactl")


class Memory(Protocol):
    """Who holds memory on which GPU."""

    def held(self, pids: Collection[int]) -> list[str]:
        """Words for each of these processes that holds memory: ``GPU 0: 71000 MiB by pid 4242``."""


class NoGpu:
    def held(self, pids: Collection[int]) -> list[str]:
        return []


class Nvml:
    """Asks the driver (nvidia-ml-py, which SGLang requires). Its pids are the host's: in another pid namespace none is ours."""

    def __init__(self, pynvml: Any) -> None:
        self._nvml = pynvml
        pynvml.nvmlInit()
        self._gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]

    def held(self, pids: Collection[int]) -> list[str]:
        found = []
        for index, gpu in enumerate(self._gpus):
            try:
                processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(gpu)
            except self._nvml.NVMLError:  # a GPU that fell off the bus: the next start will say so
                continue
            for process in processes:
                if process.pid in pids:
                    found.append(f"GPU {index}: {(process.usedGpuMemory or 0) >> 20} MiB by pid {process.pid}")
        return found


def find() -> Memory:
    """This host's GPUs. Blocks: without the persistence daemon the driver takes a second."""
    if not CONTROL_DEVICE.exists():
        return NoGpu()
    try:
        import pynvml  # type: ignore[import-not-found,unused-ignore]

        return Nvml(pynvml)
    except Exception as error:  # NVML's own errors have no common base outside of it
        logging.warning("NVML does not answer, GPU memory is not checked before a restart: %s", error)
        return NoGpu()
