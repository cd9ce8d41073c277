"""GPUs: NVML's answers with the driver's library replaced (its own answers need a GPU)."""

from types import SimpleNamespace
from typing import Any

import pytest

from shared.gpus import Gpus

GIB = 1 << 30


class Library:
    """The part of pynvml that is used; GPU 1 is broken."""

    NVMLError = RuntimeError
    NVML_TEMPERATURE_GPU = 0

    def nvmlInit(self) -> None:
        self.ready = True

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def _answer(self, gpu: int, answer: Any) -> Any:
        if gpu == 1:
            raise RuntimeError("GPU is lost")
        return answer

    def nvmlDeviceGetUUID(self, gpu: int) -> str:
        return f"GPU-{gpu}{gpu}ab-cd"

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: int) -> Any:
        ours = SimpleNamespace(pid=10 + gpu, usedGpuMemory=(1 + gpu) << 30)
        return self._answer(gpu, [ours, SimpleNamespace(pid=99, usedGpuMemory=None)])

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> Any:
        return self._answer(gpu, SimpleNamespace(used=(1 + gpu) * GIB, total=80 * GIB))

    def nvmlDeviceGetUtilizationRates(self, gpu: int) -> Any:
        return self._answer(gpu, SimpleNamespace(gpu=37, memory=5))

    def nvmlDeviceGetTemperature(self, gpu: int, sensor: int) -> Any:
        return self._answer(gpu, 51 + sensor)

    def nvmlDeviceGetPowerUsage(self, gpu: int) -> Any:
        return self._answer(gpu, 350_500)


def test_only_memory_of_our_own_processes_is_held() -> None:
    memory = Gpus(Library())
    assert memory.held({10, 12, 500}) == ["GPU 0: 1024 MiB by pid 10", "GPU 2: 3072 MiB by pid 12"]
    assert memory.held({99}) == ["GPU 0: 0 MiB by pid 99", "GPU 2: 0 MiB by pid 99"]
    assert memory.held({500}) == []


@pytest.mark.parametrize(
    ("devices", "indices"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [2, 0]),
        (" 1 ", [1]),
        ("GPU-22ab-cd,GPU-0", [2, 0]),
        ("0,-1,2", [0]),
        ("0,7,2", [0]),
        ("GPU-", []),
        ("MIG-aa", []),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(devices: str | None, indices: list[int]) -> None:
    assert [gpu.index for gpu in Gpus(Library()).visible(devices)] == indices


def test_a_reading_has_what_the_gpu_says_and_none_for_the_rest() -> None:
    gpus = Gpus(Library())
    good, lost = gpus.read(gpus.all[0]), gpus.read(gpus.all[1])
    assert (good.used_bytes, good.total_bytes, good.utilization, good.temperature, good.watts) == (GIB, 80 * GIB, 0.37, 51, 350.5)
    assert {lost.used_bytes, lost.total_bytes, lost.utilization, lost.temperature, lost.watts} == {None}
