"""A real node with faults and load under a real Prometheus: `python -m tests.monitored MODEL`.

Records the node's and the frontend's metrics in tests/recorded/metrics, and says what each query of the dashboard shows.
--hold SECONDS: goes on with load for so long; --picture PNG: draws the dashboard then (see monitoring/picture).
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.frontend import free_port
from tests.harness import CPU, Node, marked_pids, send, wait_for
from tests.prometheus import Prometheus
from tests.streams import Streams

RECORDED = Path(__file__).with_name("recorded") / "metrics"
SAMPLE = re.compile(r"^([^\s{#]+)(?:\{(.*)\})? ")
LABEL = re.compile(r'(\w+)="')


def sample_of_each(text: str) -> str:
    """The largest sample of each name with its label names: what a query can refer to. HELP and TYPE stay."""
    kept: dict[object, str] = {}
    for line in text.splitlines():
        match = SAMPLE.match(line)
        key = line if match is None else (match[1], tuple(sorted(LABEL.findall(match[2] or ""))))
        if key not in kept or (match is not None and _value(line) > _value(kept[key])):
            kept[key] = line
    return "\n".join(kept.values()) + "\n"


def _value(line: str) -> float:
    return float(line.rpartition(" ")[2])


def scrape(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def scheduler(node: Node) -> int:
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in marked_pids(node.runtime_dir)}
    return next(pid for pid, title in titles.items() if title.startswith(b"sglang::scheduler"))


def refused(node: Node) -> bool:
    """A request that the engine refuses: its prompt is longer than the context."""
    body = json.dumps({"model": "demo", "prompt": [50] * 70_000, "max_tokens": 1}).encode()
    asked = urllib.request.Request(f"{node.url}/v1/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=20):
            return False
    except urllib.error.HTTPError:
        return True


def work(node: Node, streams: int, tokens: int) -> None:
    with Streams() as started:
        for number in range(streams):
            started.start(node.url, "demo", 1, tokens, prompt=[20 + number, *range(40, 140)])
        started.join()


def cancelled(node: Node) -> None:
    """A client that leaves after a second."""
    body = json.dumps({"model": "demo", "prompt": [60] * 20, "max_tokens": 2000, "stream": True, "ignore_eos": True})
    command = ["curl", "-s", "-m", "1", f"{node.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 28


def scene(node: Node, hold: float, picture: list[str]) -> None:
    """Load; a refused and a cancelled request; a death of the engine under streams; load again; a drain."""
    node.start().wait_ready()
    with Prometheus(
        node.root, {"sgnode": [node.system_url.removeprefix("http://")], "sgnode-frontend": [node.url.removeprefix("http://")]}
    ) as prometheus:
        print(f"node {node.system_url}   frontend {node.url}   prometheus {prometheus.url}", flush=True)
        work(node, 6, 120)
        assert refused(node)
        cancelled(node)
        with Streams() as streams:
            for number in range(4):
                streams.start(node.url, "demo", 1, 2000, prompt=[70 + number] * 50)
            wait_for("streams run", lambda: node.status().get("inflight", 0) >= 4, 20)
            send(scheduler(node), signal.SIGKILL)
            wait_for("another engine", lambda: node.status().get("incarnation") == 2, 30)
            node.wait_ready(90)
        end = time.monotonic() + hold
        work(node, 6, 120)
        while time.monotonic() < end:
            work(node, 8, 150)
        for name, url in {"node": node.system_url, "frontend": node.url}.items():
            (RECORDED / f"{name}.txt").write_text(sample_of_each(scrape(url)))
        wait_for("a last scrape", lambda: prometheus.query("up"), 5)
        command = [sys.executable, "-m", "monitoring.check", prometheus.url, "--minutes", "4", "--rate-interval", "10s"]
        subprocess.run(command, check=False)
        if picture:
            kept = ["--work", picture[1]] if picture[1:] else []
            subprocess.run([sys.executable, "-m", "monitoring.picture", *command[3:], picture[0], *kept], check=True)
        print(json.dumps([alert["metric"]["alertname"] for alert in prometheus.query('ALERTS{alertstate="firing"}')]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--hold", type=float, default=0.0)
    parser.add_argument("--picture", nargs="+", default=[], help="PNG, and a folder that keeps npm packages")
    args = parser.parse_args()
    RECORDED.mkdir(exist_ok=True)
    where = {"endpoint": f"tcp://127.0.0.1:{free_port()}", "replay_endpoint": f"tcp://127.0.0.1:{free_port()}"}
    flags = ["--page-size", "16", "--kv-events-config", json.dumps({"publisher": "zmq", "topic": "kv", "bind": True, **where})]
    flags += ["--served-model-name", "demo", "--enable-metrics", "--agents", "2", *CPU]
    with Node(args.model, *flags, env={"DYN_ROUTER_MODE": "kv"}) as node:
        try:
            scene(node, args.hold, args.picture)
        except AssertionError:
            print(node.logs())
            raise


if __name__ == "__main__":
    main()
