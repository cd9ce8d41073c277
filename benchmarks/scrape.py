"""What a scrape costs, with SGLang's metrics and two agents: ``python -m benchmarks.scrape MODEL [RESULT.json]``.

Wall time of each scrape and CPU of each process that takes part, idle and under streams.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.harness import CPU, ONE_THREAD, Node
from tests.streams import Streams

SCRAPES = 100
STREAMS = 16
TOKENS = 3500
"""All of them together fit into CPU's 65,536; long enough for the whole measurement."""


def measure(node: Node) -> dict[str, Any]:
    """CPU in ms a scrape, beside what the process takes anyway, and the scrape's time in ms."""
    names = ("relay", "prober", "agent:0", "agent:1")
    processes = {name: psutil.Process(node.pid(name)) for name in names}
    processes["supervisord"] = psutil.Process(node.status()["supervisord_pid"])

    def used(seconds: float, scrapes: int) -> tuple[dict[str, float], list[float], int]:
        before = {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
        began, times, size = time.monotonic(), [], 0
        for _ in range(scrapes):
            asked = time.monotonic()
            size = len(requests.get(f"{node.system_url}/metrics", timeout=5).content)
            times.append((time.monotonic() - asked) * 1e3)
            time.sleep(0.05)
        time.sleep(max(0.0, seconds - (time.monotonic() - began)))
        whole = time.monotonic() - began
        return {name: (sum(process.cpu_times()[:2]) - before[name]) / whole for name, process in processes.items()}, times, size

    resting, _, _ = used(8.0, 0)
    began = time.monotonic()
    working, times, size = used(0.0, SCRAPES)
    each = (time.monotonic() - began) / SCRAPES
    return {
        "bytes": size,
        "cpu_ms": {name: round((working[name] - resting[name]) * each * 1e3, 1) for name in processes},
        "ms": {
            "median": round(statistics.median(times), 1),
            "p99": round(sorted(times)[int(len(times) * 0.99) - 1], 1),
            "worst": round(max(times), 1),
        },
    }


def main() -> None:
    arguments = ["--served-model-name", "demo", *CPU, "--enable-metrics", "--agents", "2"]
    with Node(sys.argv[1], *arguments, env=ONE_THREAD) as node:
        node.start().wait_ready(300)
        with Streams() as streams:
            streams.start(node.url, "demo", 8, 64)
            streams.join(60)
        found: dict[str, Any] = {"scrapes": SCRAPES, "idle": measure(node)}
        with Streams() as streams:
            streams.flowing(streams.start(node.url, "demo", STREAMS, TOKENS))
            found[f"{STREAMS} streams"] = measure(node)
    print(json.dumps(found, indent=1))
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps({"command": " ".join(sys.argv), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
