"""One command: tokens/s, TTFT and ITL of a node over HTTP beside raw ``sgl.Engine``, in turns, in one run.

usage: python -m benchmarks.compare [--model DIR] [--streams 1,8,32] [--rounds 3] [--output FILE] [-- worker flags]
Each round starts the raw engine, then the node, so that a drift of the machine hits both.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import http_load
from benchmarks.figures import median
from procs.cli.serve import engine_environment
from tests.harness import Node

KEYS = ("tokens_per_s", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99")


def raw(argv: list[str], loads: list[tuple[int, int]], shape: dict[str, int]) -> list[dict[str, float]]:
    """Run the raw engine on the loads; one result each."""
    spec = json.dumps({"loads": loads, "shape": shape})
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.raw_engine", spec, "--", *argv]
    done = subprocess.run(command, env=engine_environment(), capture_output=True, text=True, timeout=900, check=False)
    results = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if len(results) != len(loads):
        raise SystemExit(f"raw engine failed:\n{done.stderr[-3000:]}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model directory (default: a demo model made for the run)")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3, help="engine starts on each side")
    parser.add_argument("--repeats", type=int, default=3, help="loads of each size in a round")
    parser.add_argument("--input", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=290, help="highest token id of a prompt")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    parser.add_argument("worker", nargs="*", help="further flags for both sides")
    options = parser.parse_args()
    shape = {"input": options.input, "output": options.output_tokens, "vocab": options.vocab}
    sizes = [int(n) for n in options.streams.split(",")]
    results: dict[str, dict[int, list[dict[str, float]]]] = {side: {n: [] for n in sizes} for side in ("raw", "node")}
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or f"{scratch}/demo"
        if not options.model:
            subprocess.run([Path(sys.executable).with_name("sgnode"), "demo-model", model], check=True)
        for turn in range(options.rounds):
            loads = [(n, 1_000 * (turn * 100 + r * 10) + n) for r in range(options.repeats) for n in sizes]
            node = Node(model, *options.worker)
            with node:
                node.start().wait_ready(300)
                argv = json.loads(node.sgnode("show-config").stdout)["worker_argv"]
                name = node.status()["model"]
                http_load.load(node.url, name, 4, 999_983, shape)
                for n, seed in loads:
                    results["node"][n].append(http_load.load(node.url, name, n, seed, shape).as_dict())
                node.terminate()
                node.wait_stopped(60)
            for (n, _), result in zip(loads, raw(argv, loads, shape), strict=True):
                results["raw"][n].append(result)
            print(f"round {turn + 1} of {options.rounds} done", file=sys.stderr)
    print(table(results, sizes))
    if options.output:
        options.output.write_text(json.dumps(document(results, options), indent=1) + "\n")


def table(results: dict[str, dict[int, list[dict[str, float]]]], sizes: list[int]) -> str:
    """Median [lowest, highest] over all loads of a size; times in ms."""
    lines = [f"{'streams':>7} {'side':>5} " + " ".join(f"{key:>26}" for key in KEYS)]
    for n in sizes:
        for side in ("raw", "node"):
            cells = []
            for key in KEYS:
                values = [result[key] for result in results[side][n]]
                cells.append(f"{median(values):10.2f} [{min(values):.1f}, {max(values):.1f}]".rjust(26))
            lines.append(f"{n:>7} {side:>5} " + " ".join(cells))
        ratio = median([r["tokens_per_s"] for r in results["node"][n]]) / median([r["tokens_per_s"] for r in results["raw"][n]])
        lines.append(f"{n:>7} ratio node/raw tokens_per_s {ratio:.2f}")
    return "\n".join(lines)


def document(results: dict[str, dict[int, list[dict[str, float]]]], options: argparse.Namespace) -> dict[str, Any]:
    names = ("sglang", "ai-dynamo", "torch", "pyzmq", "msgspec")
    return {
        "date": datetime.date.today().isoformat(),
        "command": "python -m benchmarks.compare " + " ".join(sys.argv[1:]),
        "host": {"machine": platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in names},
        "shape": {"input": options.input, "output": options.output_tokens},
        "results": results,
    }


if __name__ == "__main__":
    main()
