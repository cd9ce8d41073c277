"""Where a run was made: the machine, its accelerators, and the versions of what was measured."""

import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

PACKAGES = ("sgnode", "sglang", "ai-dynamo", "ai-dynamo-runtime", "torch", "pyzmq", "msgspec", "uvloop", "aiohttp")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def describe() -> dict[str, Any]:
    memory = round(psutil.virtual_memory().total / 2**30, 1)
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_gib": memory,
        "gpus": gpus(),
    }


def header(module: str) -> dict[str, Any]:
    """What every kept result says first: when, by which command, where, with which versions."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "host": describe(),
        "versions": versions(),
    }


def gpus() -> list[str]:
    """Names of the accelerators that nvidia-smi sees; none where it isn't."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip().splitlines() if done.returncode == 0 else []
