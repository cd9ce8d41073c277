"""Memory of a node by process: ``python -m benchmarks.memory [--name NAME | --runtime-dir DIR | --start [-- SERVE FLAGS]]``.

MB are 10^6 bytes. RSS counts what processes share in each of them, PSS divides it among them, USS leaves it out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from benchmarks.token_path import host
from procs.cli import runtime_dir
from procs.cli.status import document_of
from shared.errors import NodeError
from tests.harness import Node

MB = 1e6
HEADINGS = ("rss", "pss", "uss")
Row = tuple[str, dict[str, float]]


def measure(directory: Path) -> list[Row]:
    """Each process of the node in ``directory``, the engine's own last. Raises NodeError or OSError when none answers."""
    document = document_of(directory)
    names = {row["pid"]: row["name"] for row in document["processes"] if row["pid"]}
    keeper = next((pid for pid, name in names.items() if name == "keeper"), None)
    supervisord = psutil.Process(document["supervisord_pid"])
    found = [("supervisord", supervisord), *((_name(each, names), each) for each in supervisord.children(recursive=True))]
    ours = {each.pid for each in psutil.Process(keeper).children(recursive=True)} if keeper else set()
    found.sort(key=lambda row: row[1].pid in ours)
    return [(name, _memory(process)) for name, process in found]


def _name(process: psutil.Process, names: dict[int, str]) -> str:
    if process.pid in names:
        return names[process.pid]
    words = process.cmdline() or [process.name()]
    if words[0].startswith("sglang::"):
        return words[0].split()[0]
    return next((word.split(" ")[1] if " " in word else word for word in words[1:] if word[0] != "-"), words[0])


def _memory(process: psutil.Process) -> dict[str, float]:
    full = process.memory_full_info()
    return {name: getattr(full, name) / MB for name in HEADINGS}


def table(rows: list[Row]) -> str:
    lines = [f"{'MB':34}" + "".join(f"{heading.upper():>9}" for heading in HEADINGS)]
    total = ("in all", {heading: sum(memory[heading] for _, memory in rows) for heading in HEADINGS})
    lines += [f"{name:34}" + "".join(f"{memory[heading]:9.1f}" for heading in HEADINGS) for name, memory in [*rows, total]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="name of a node that runs (default: the only one)")
    parser.add_argument("--runtime-dir", type=Path, help="its runtime directory")
    parser.add_argument("--start", action="store_true", help="start a node and measure it when it is ready")
    parser.add_argument("--model", type=Path, help="with --start (a tiny model, made here)")
    parser.add_argument("--record", type=Path, help="JSON file to write")
    parser.add_argument("flags", nargs="*", help="further flags of `sgnode serve`, after --")
    options = parser.parse_args()
    if options.start:
        rows = of_new(options.model, options.flags)
    else:
        try:
            rows = measure(runtime_dir.find(options.name, options.runtime_dir).absolute())
        except (NodeError, OSError) as error:
            print(f"no node to measure: {error} (--start starts one)", file=sys.stderr)
            return 2
    print(table(rows))
    if options.record:
        document: dict[str, Any] = {
            **host.header("benchmarks.memory"),
            "mb": [{"process": name, **memory} for name, memory in rows],
        }
        options.record.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def of_new(model: Path | None, flags: list[str]) -> list[Row]:
    """Of a node that is started for it."""
    with tempfile.TemporaryDirectory(prefix="sgn-model-") as made:
        if model is None:
            model = Path(made) / "demo"
            subprocess.run([Node.tool("sgnode"), "demo-model", str(model)], check=True, stdout=subprocess.DEVNULL)
        with Node(str(model), "--served-model-name", "demo", "--drain-grace", "0", *flags) as node:
            node.start().wait_ready(1800.0)
            rows = measure(node.runtime_dir)
            node.sgnode("stop", "--now")
            node.wait_stopped()
            return rows


if __name__ == "__main__":
    sys.exit(main())
