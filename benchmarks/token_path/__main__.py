"""The run: every side in turns, its outputs looked at, its loads, its end. Exit code 1 when it may not be compared."""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.token_path import model, options, outputs, paired, table
from benchmarks.token_path.clients import LoadError
from benchmarks.token_path.load import Load
from benchmarks.token_path.measure import measure
from benchmarks.token_path.record import Record, label
from benchmarks.token_path.side import ALONE, Failed, Place, Setup, Side, Wanted, make, together

WARM_OUTPUT = 16
BUSY = 0.8
"""Share of a core above which a client process may be what is measured."""
LOG_LINES = 15
"""Of each log's end that the record keeps of a side that failed."""
SEEDS = 100_000
"""Prompts that one load may use up."""


def main() -> int:
    found = options.parse()
    # Told to end, it ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="token-path-") as scratch:
        directory = prepare_model(found, Path(scratch))
        asked = {key: value for key, value in vars(found).items() if key not in ("sides", "model", "record", "logs")}
        record = Record(found.record, {**asked, "sides": [str(wanted) for wanted in found.sides]})
        run = Run(found, directory, record, found.logs or Path(scratch) / "logs")
        (run.at_once if found.at_once else run.one_by_one)()
    return finish(record)


def prepare_model(found: argparse.Namespace, scratch: Path) -> Path:
    """The directory of the model, which is made when it has to be."""
    if found.model is None:
        directory = scratch / "demo"
        subprocess.run([sys.executable, "-m", "procs.cli", "demo-model", directory], check=True, stdout=subprocess.DEVNULL)
        return directory
    directory = Path(found.model).absolute()
    if found.shape:
        model.make(directory, found.shape)
    return directory


class Run:
    """What all starts of a run share."""

    def __init__(self, found: argparse.Namespace, directory: Path, record: Record, logs: Path) -> None:
        self._found, self._record, self._logs = found, record, logs
        self._vocab = int(json.loads((directory / "config.json").read_text())["vocab_size"])
        self._setup = Setup(directory, found.flags, found.agents[0], found.clients, found.step_ms / 1e3, self._vocab)
        self._seeds = iter(range(SEEDS, 10**9, SEEDS))

    def one_by_one(self) -> None:
        """Each round starts every side anew, sends it all loads and ends it, before the next."""
        for turn in range(self._found.rounds):
            for sides in together(self._found.sides):
                with ExitStack() as stack:
                    if (up := self._start(sides, turn, stack)) is not None:
                        for wanted in sides:
                            self._loads(up, wanted, turn, self._agents(wanted))

    def at_once(self) -> None:
        """All sides are started first, and loaded in turns: what drifts on the host meets all of them alike.

        Fewer agents come after all rounds with the most, as agents are only stopped; their peers with each token by itself
        are loaded beside them again. Loads of one ``pass`` over the sides are neighbours.
        """
        with ExitStack() as stack:
            ups = [(self._start(sides, 0, stack), sides) for sides in together(self._found.sides)]
            turns = [(up, wanted) for up, sides in ups if up is not None for wanted in sides]
            passes = product(range(len(self._found.agents)), range(self._found.rounds))
            for number, (step, turn) in enumerate(passes):
                for up, wanted in turns if number % 2 == 0 else turns[::-1]:
                    agents = self._agents(wanted)
                    peers = agents if wanted.interval == 1 and len(agents) == 1 else []
                    self._loads(up, wanted, turn, agents[step : step + 1] or peers, **{"pass": number})

    def _start(self, sides: list[Wanted], turn: int, stack: ExitStack) -> "Up | None":
        """Start what these sides share, until the stack ends it. What goes wrong is recorded, and the run goes on without."""
        name = "+".join(map(str, sides))
        logs = self._logs / f"{turn}-{name.replace('/', '-')}"
        with self._recorded(name, turn, logs):
            place = stack.enter_context(Place(logs))
            side = stack.enter_context(closing(make(sides[0], self._setup, place)))
            began = time.monotonic()
            side.start()
            seconds = round(time.monotonic() - began, 2)
            self._record.add("starts", {"side": name, "round": turn, "seconds": seconds})
            say(f"round {turn + 1}: {name} up after {seconds} s")
            for wanted in sides:
                side.become(wanted)
                self._check(wanted, side)
                # Compiles what has to be compiled, and opens every connection.
                widest = max(self._asked(), key=lambda load: load.streams)
                warm = replace(widest, requests=1, output=WARM_OUTPUT, rate=0.0, seed=next(self._seeds))
                side.run(warm, lambda: None)
            return Up(side, place.mark, logs)
        return None

    @contextmanager
    def _recorded(self, name: str, turn: int, logs: Path) -> Iterator[None]:
        try:
            yield
        except (Failed, LoadError, OSError) as error:
            ends = {log.name: log.read_text(errors="replace").splitlines()[-LOG_LINES:] for log in sorted(logs.glob("*.log"))}
            self._record.add("failures", {"side": name, "round": turn, "error": str(error), "logs": ends})
            say(f"{name}: {error} (its logs: {logs if self._found.logs else 'not kept, pass --logs DIR'})")

    def _check(self, wanted: Wanted, side: Side) -> None:
        if wanted.kind == "synthetic":
            return
        document = self._record.document
        document["texts"][str(wanted)] = side.outputs(outputs.prompts(self._vocab), outputs.OUTPUT)
        document["refused"] = document["refused"] or outputs.difference(document["texts"])
        self._record.save()

    def _loads(self, up: "Up", wanted: Wanted, turn: int, agents: list[int], **also: int) -> None:
        """All loads, with each of these numbers of agents; ``also`` is recorded. A side that failed gets no more."""
        if up.failed:
            return
        up.failed = True
        with self._recorded(str(wanted), turn, up.logs):
            up.side.become(wanted)
            for count in agents:
                up.side.scale(count)
                for repeat in range(self._found.repeats):
                    for load in self._asked():
                        about = {"side": str(wanted), "agents": count, "round": turn, "repeat": repeat, **also}
                        entry = {**about, **measure(up.side, up.mark, replace(load, seed=next(self._seeds)))}
                        self._record.add("loads", entry)
                        say(line(entry))
            up.failed = False

    def _agents(self, wanted: Wanted) -> list[int]:
        """Scaled down only where every token comes by itself."""
        if wanted.kind not in ("sgnode", "synthetic"):
            return [0]
        most_first: list[int] = self._found.agents
        return most_first if wanted.interval == 1 else most_first[:1]

    def _asked(self) -> Iterator[Load]:
        found = self._found
        for streams in found.streams:
            shape = (found.input, found.output_tokens, self._vocab)
            yield Load(streams, found.requests, *shape, seed=0, at_most=found.at_most)
        for rate in found.open_rate:
            yield Load(max(found.streams), 1, *shape, seed=0, at_most=found.open_seconds, rate=rate)


@dataclass
class Up:
    """A start of a side, or of several that share it."""

    side: Side
    mark: str
    """Of its processes."""
    logs: Path
    failed: bool = False


def line(entry: dict[str, Any]) -> str:
    """A load on one line, while the run goes on."""
    text = f"{label(entry)}, {entry['load']}: {table.number(entry['tokens_per_s'])} tok/s"
    if entry["itl_p50"] is not None:
        text += f", TTFT p50 {table.number(entry['ttft_p50'])} ms, ITL p50 {table.number(entry['itl_p50'])} ms"
    if entry["clients_busiest"] > BUSY and entry["side"].partition("/")[0] not in ALONE:
        text += f"; WARNING: a client process used {entry['clients_busiest']:.0%} of a core, pass more --clients"
    return text


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def finish(record: Record) -> int:
    """Print the comparison, or one line that says why there is none."""
    document = record.document
    failed = [f"{failure['side']}: {failure['error']}" for failure in document["failures"]]
    if document["refused"]:
        say(f"not compared: {document['refused']}")
        return 1
    if document["loads"]:
        print("\n\n".join(filter(None, (table.render(document["loads"]), paired.render(document["loads"])))))
    if failed:
        say(f"failed: {'; '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
