"""How long a killed process keeps GPU memory, and when its death can be seen: ``python -m benchmarks.gpu_memory [GIB] [ROUNDS]``.

Needs a GPU and nvidia-ml-py; no torch. A process takes GIB of GPU memory and as much pinned host memory / 8, gets SIGKILL, and
is watched by what the keeper uses: the kernel's mark of an exiting process, its pidfd, NVML's list of processes.
"""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from procs.keeper import tree
from shared import gpus

HOLDER = """
import ctypes, signal, sys
cuda = ctypes.CDLL("libcuda.so.1")
gib = int(sys.argv[1])
def ok(code): assert code == 0, code
device, context, memory, pinned = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_void_p()
ok(cuda.cuInit(0)); ok(cuda.cuDeviceGet(ctypes.byref(device), 0)); ok(cuda.cuCtxCreate_v2(ctypes.byref(context), 0, device))
ok(cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(gib << 30)))
ok(cuda.cuMemHostAlloc(ctypes.byref(pinned), ctypes.c_size_t((gib << 30) // 8), 0))
ctypes.memset(pinned, 1, (gib << 30) // 8)
print("held", flush=True)
signal.pause()
"""


def one_round(memory: gpus.Gpus, gib: int) -> str:
    """Times in ms after SIGKILL."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(gib)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    held = memory.held({holder.pid})
    pidfd = os.pidfd_open(holder.pid)
    stat = Path(f"/proc/{holder.pid}/stat")
    began = time.monotonic()
    os.kill(holder.pid, signal.SIGKILL)
    while tree.end_status(stat.read_text()) is None:
        pass
    marked = time.monotonic() - began
    while not select.select([pidfd], [], [], 0.001)[0]:
        pass
    readable = time.monotonic() - began
    os.close(pidfd)
    listed = memory.held({holder.pid})
    while memory.held({holder.pid}):
        time.sleep(0.001)
    free = time.monotonic() - began
    holder.wait()
    return (
        f"held {held}; marked {marked * 1e3:.1f} ms, pidfd {readable * 1e3:.0f} ms, then held {listed}, free {free * 1e3:.0f} ms"
    )


def main() -> None:
    gib, rounds = (int(text) for text in [*sys.argv[1:], "60", "5"][:2]) if len(sys.argv) < 3 else map(int, sys.argv[1:3])
    memory = gpus.find()
    if memory is None:
        raise SystemExit("no GPU")
    for _ in range(rounds):
        print(one_round(memory, gib), flush=True)


if __name__ == "__main__":
    main()
