"""Where the seconds of a start go, beside a bare ``sgl.Engine``: ``python -m benchmarks.startup [--rounds N] [-- SERVE FLAGS]``.

In turns: a node until its frontend has the model; `sgl.Engine` with the same flags in the environment of the node's engine; the
same without garbage collection in its imports, which is how the node's engine starts: what the processes beside it cost is the
difference to that.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.token_path import host
from procs.coordinator.startup import LOGGED, PHASES
from procs.engine.load_progress import LoadProgress
from shared import config
from tests.harness import Node, wait_for

SIDES = ("node", "sgl.Engine", "the same, collector held")
LIMIT_SECONDS = 1800.0
NOT_THEIRS = re.compile(r"SGNODE_|TMPDIR$|PROMETHEUS_MULTIPROC_DIR$")
"""Variables of one life of the node's engine."""
ENGINE = ("imports", "children", "init", "weights", "kv_cache", "graphs", "load", "warm_up")
"""Phases from the fork of the engine's process to its being ready."""
Phases = dict[str, float]


def start_node(model: Path, flags: list[str]) -> tuple[Phases, list[str], dict[str, str]]:
    """Seconds by phase, and what the engine was started with: flags and environment."""
    with Node(str(model), "--served-model-name", "demo", "--drain-grace", "0", *flags) as node:
        began = time.time()
        node.start().wait_ready(LIMIT_SECONDS)
        listed = time.time()
        startup = node.status()["startup"]
        marks = startup["marks"]
        environ = Path(f"/proc/{node.pid('engine')}/environ").read_bytes().decode().split("\0")
        variables = dict(each.split("=", 1) for each in environ if "=" in each and not NOT_THEIRS.match(each.split("=", 1)[0]))
        found = startup["phases"] | {"listed": listed - marks["serving"], "total": listed - began}
        found["engine"] = marks["ready"] - marks["forked"]
        argv = config.load(node.runtime_dir).worker_argv
        node.sgnode("stop", "--now")
        node.wait_stopped()
        return found, argv, variables


def start_bare(argv: list[str], variables: dict[str, str], *, hold: bool) -> Phases:
    """Seconds by phase, from the start of the process."""
    with tempfile.TemporaryDirectory(prefix="sgn-") as place:
        log, marks = Path(place) / "log", dict[str, float]()
        log.touch()
        progress = LoadProgress(log, marks)
        at = began = time.time()
        with log.open("ab") as out:
            command = [sys.executable, "-m", "benchmarks.bare_start", *(["--hold"] if hold else []), "--", *argv]
            process = subprocess.Popen(command, env={**variables, "TMPDIR": place}, stdout=out, stderr=out)
        wait_for("the engine", lambda: b"\nREADY " in log.read_bytes() or process.poll() is not None, LIMIT_SECONDS, every=0.1)
        said = re.search(rb"^READY (\S+)$", log.read_bytes(), re.MULTILINE)
        assert said, log.read_text()[-2000:]
        process.wait(60)
        progress.look()
        marks["ready"] = float(said[1])
    found = {}
    for phase, mark in PHASES:
        if mark in marks and (mark in LOGGED or mark == "ready"):
            found[phase] = max(0.0, marks[mark] - at)
            at = max(at, marks[mark])
    return found | {"engine": marks["ready"] - began}


def table(results: dict[str, list[Phases]]) -> str:
    """Seconds: the median of the rounds, with the shortest and the longest."""
    names = [phase for phase, _ in PHASES]
    rows = [*names[: names.index("imports")], *ENGINE, "engine", *names[names.index("registered") :], "listed", "total"]
    lines = [f"{'seconds':12}" + "".join(f"{side:>30}" for side in SIDES)]
    for row in rows:
        cells = []
        for side in SIDES:
            values = [found[row] for found in results[side] if row in found]
            cells.append(f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-")
        if any(cell != "-" for cell in cells):
            lines.append(f"{row:12}" + "".join(f"{cell:>30}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="(a tiny model, made here)")
    parser.add_argument("--record", type=Path, help="JSON file to write")
    parser.add_argument("flags", nargs="*", help="further flags of `sgnode serve`, after --")
    options = parser.parse_args()
    results: dict[str, list[Phases]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="sgn-model-") as made:
        model = options.model or Path(made) / "demo"
        if options.model is None:
            subprocess.run([Node.tool("sgnode"), "demo-model", str(model)], check=True, stdout=subprocess.DEVNULL)
        for number in range(options.rounds):
            found, argv, variables = start_node(model, options.flags)
            results[SIDES[0]].append(found)
            for side, hold in zip(SIDES[1:], (False, True), strict=True):
                results[side].append(start_bare(argv, variables, hold=hold))
            engines = ", ".join(f"{side} {rounds[-1]['engine']:.2f} s" for side, rounds in results.items())
            print(f"round {number + 1} of {options.rounds}: {engines}", file=sys.stderr)
    print(table(results))
    if options.record:
        document: dict[str, Any] = {
            **host.header("benchmarks.startup"),
            "seconds": results,
        }
        options.record.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
