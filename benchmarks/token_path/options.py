"""The command line of ``python -m benchmarks.token_path``."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.token_path.model import SHAPES
from benchmarks.token_path.side import Wanted
from procs.cli.flags import count
from procs.cli.serve import CPU_DEFAULTS, has_gpu

DESCRIPTION = "Tokens per second, TTFT, ITL, CPU and memory of sides that serve one model, under the same loads, in turns."
SIDES = "raw,ceiling,scheduler,dynamo,dynamo/20,sgnode,sgnode/20"
EPILOG = """\
sides: raw (sgl.Engine alone), ceiling (its schedulers, nothing done for a token), scheduler (nothing streamed),
dynamo (dynamo.frontend and dynamo.sglang), sgnode (a node with its frontend), synthetic (a node with an engine of dialled
steps). KIND/K: with --stream-interval K.
After -- come SGLang's flags, the same for all sides."""


class Parser(argparse.ArgumentParser):
    """One line and exit code 2 for bad input."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"token_path: error: {message}\n")


def _listed(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        try:
            return [one(item) for item in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise ValueError(f"expected a number from 0, got {text!r}")
    return value


def _positive(text: str) -> float:
    try:
        if value := _amount(text):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")


def parser() -> Parser:
    cores = os.cpu_count() or 2
    made = Parser(
        prog="python -m benchmarks.token_path",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--sides", type=_listed(Wanted.parse), default=SIDES, metavar="SIDE,...", help="in this order (%(default)s)")
    add(
        "--agents",
        type=_listed(count),
        default="4,2,1",
        metavar="N,...",
        help="of a node; with /K the most only (%(default)s)",
    )
    add("--streams", type=_listed(count), default="1,8,32", metavar="N,...", help="closed loops: streams at once (%(default)s)")
    add("--requests", type=count, default=4, help="of each stream, one after another (%(default)s)")
    add("--open-rate", type=_listed(_amount), default=[], metavar="R,...", help="open loops: requests a second")
    add("--open-seconds", type=_positive, default=10.0, help="how long an open loop sends (%(default)g)")
    add("--at-most", type=_positive, default=60.0, help="seconds after which a stream sends no third request (%(default)g)")
    add("--rounds", type=count, default=3, help="of all sides, each with a start of every side (%(default)s)")
    add("--at-once", action="store_true", help="start every side first, and load them in turns; pass SGLang --sleep-on-idle")
    add("--repeats", type=count, default=1, help="of each load in a round (%(default)s)")
    add("--input", type=count, default=256, help="tokens of a prompt (%(default)s)")
    add("--output-tokens", type=count, default=128, help="tokens of an answer (%(default)s)")
    add("--clients", type=count, default=max(1, cores // 2), help="client processes (half of the cores: %(default)s)")
    add("--step-ms", type=_positive, default=2.0, help="one step of the synthetic engine (%(default)g)")
    add("--model", type=Path, help="model directory (default: a demo model, made for the run)")
    add("--shape", choices=tuple(SHAPES), help="make a Llama of this shape in --model first, and run it with dummy weights")
    add("--record", type=Path, metavar="FILE", help="the run as JSON, written after every load")
    add("--logs", type=Path, metavar="DIR", help="every process's log (default: left out)")
    add("flags", nargs="*", metavar="-- FLAGS", help="SGLang's flags for every side")
    return made


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for, ``flags`` complete. Exits with code 2 for bad input."""
    made = parser()
    given = list(sys.argv[1:] if argv is None else argv)
    at = given.index("--") if "--" in given else len(given)
    found = made.parse_args(given[:at])
    if found.flags:
        made.error(f"SGLang's flags go after --, got {found.flags[0]!r} before")
    found.flags = given[at + 1 :]
    found.open_rate = [rate for rate in found.open_rate if rate]
    if found.agents != sorted(found.agents, reverse=True):
        made.error("--agents: expected the most first: agents are only stopped")
    if found.shape and not found.model:
        made.error("--shape: expected --model DIR to make it in")
    if found.model and not found.shape and not (found.model / "config.json").is_file():
        made.error(f"--model {found.model}: no model there (no config.json)")
    for directory in filter(None, (found.record and found.record.parent,)):
        if not directory.is_dir():
            made.error(f"--record {found.record}: no such directory")
    if found.shape and "--load-format" not in found.flags:
        found.flags += ["--load-format", "dummy"]
    if not has_gpu() and "--device" not in found.flags:
        found.flags += [part for flag, values in CPU_DEFAULTS.items() if flag not in found.flags for part in (flag, *values)]
    return found
