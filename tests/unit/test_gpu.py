"""GPU memory of the dead: NVML's answer in words, with the driver's library replaced (its own answers need a GPU)."""

from types import SimpleNamespace
from typing import Any

from procs.keeper.gpu import Nvml


class Library:
    """The part of pynvml that is used; GPU 1 is broken."""

    NVMLError = RuntimeError

    def nvmlInit(self) -> None:
        self.ready = True

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: int) -> list[Any]:
        if gpu == 1:
            raise RuntimeError("GPU is lost")
        return [SimpleNamespace(pid=10 + gpu, usedGpuMemory=(1 + gpu) << 30), SimpleNamespace(pid=99, usedGpuMemory=None)]


def test_only_memory_of_our_own_processes_is_held() -> None:
    memory = Nvml(Library())
    assert memory.held({10, 12, 500}) == ["GPU 0: 1024 MiB by pid 10", "GPU 2: 3072 MiB by pid 12"]
    assert memory.held({99}) == ["GPU 0: 0 MiB by pid 99", "GPU 2: 0 MiB by pid 99"]
    assert memory.held({500}) == []
