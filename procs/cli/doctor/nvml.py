"""`python -m procs.cli.doctor.nvml`: this host's GPUs as JSON (`gpu.Facts`), in a process that may hang with the driver."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

SMI = ("index", "name", "uuid", "memory.total", "memory.used", "persistence_mode", "mig.mode.current", "driver_version")
"""What is asked of nvidia-smi where NVML's Python module is missing."""


def by_nvml(nvml: Any) -> dict[str, Any]:
    """Asks the driver's library. What a GPU doesn't have is None. Raises NVML's errors."""
    nvml.nvmlInit()

    def maybe(ask: Callable[..., Any], *args: Any) -> Any:
        try:
            return ask(*args)
        except nvml.NVMLError:
            return None

    gpus = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError as lost:
            gpus.append({"index": index, "lost": str(lost)})
            continue
        memory = maybe(nvml.nvmlDeviceGetMemoryInfo, handle)
        mig = maybe(nvml.nvmlDeviceGetMigMode, handle)
        rows = maybe(nvml.nvmlDeviceGetRemappedRows, handle)
        wrong = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        holders = maybe(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
        gpus.append(
            {
                "index": index,
                "name": maybe(nvml.nvmlDeviceGetName, handle) or "?",
                "uuid": maybe(nvml.nvmlDeviceGetUUID, handle) or "",
                "total_mib": (memory.total >> 20) if memory else 0,
                "used_mib": (memory.used >> 20) if memory else 0,
                "persistence": maybe(nvml.nvmlDeviceGetPersistenceMode, handle),
                "ecc_uncorrected": maybe(nvml.nvmlDeviceGetTotalEccErrors, handle, *wrong),
                "remap_pending": bool(rows[2]) if rows else None,
                "remap_failed": bool(rows[3]) if rows else None,
                "mig": bool(mig[0]) if mig else False,
                "holders": [[each.pid, (each.usedGpuMemory or 0) >> 20] for each in holders],
            }
        )
    cuda = nvml.nvmlSystemGetCudaDriverVersion()
    return {"driver": nvml.nvmlSystemGetDriverVersion(), "cuda": [cuda // 1000, cuda % 1000 // 10], "gpus": gpus}


def by_smi(csv: str) -> dict[str, Any]:
    """From `nvidia-smi --query-gpu=… --format=csv,noheader,nounits`: less is known."""
    gpus, driver = [], ""
    for line in csv.strip().splitlines():
        index, name, uuid, total, used, persistence, mig, driver = (cell.strip() for cell in line.split(","))
        gpus.append(
            {
                "index": int(index),
                "name": name,
                "uuid": uuid,
                "total_mib": int(total) if total.isdigit() else 0,
                "used_mib": int(used) if used.isdigit() else 0,
                "persistence": {"Enabled": 1, "Disabled": 0}.get(persistence),
                "mig": mig == "Enabled",
            }
        )
    return {"driver": driver, "cuda": None, "gpus": gpus}


def main() -> None:
    try:
        import pynvml  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        query = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit((done.stdout + done.stderr).strip() or f"nvidia-smi: exit code {done.returncode}")
        found = by_smi(done.stdout)
    else:
        found = by_nvml(pynvml)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
