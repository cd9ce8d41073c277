"""A side of the comparison: what is started, given loads and ended; and the names by which sides are asked for."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from benchmarks.token_path import processes
from benchmarks.token_path.drive import Done
from benchmarks.token_path.load import Load
from procs.cli.serve import engine_environment

KINDS = ("raw", "ceiling", "scheduler", "dynamo", "sgnode", "synthetic")
ALONE = ("raw", "ceiling", "scheduler")
"""One process with ``sgl.Engine``, which can be any of them."""
MODEL = "token-path"
"""The name under which every side serves the model."""
START_SECONDS = 300.0


@dataclass(frozen=True)
class Wanted:
    """A side as asked for: ``KIND`` or ``KIND/K``, K being its --stream-interval."""

    kind: str
    interval: int = 1

    @classmethod
    def parse(cls, text: str) -> "Wanted":
        """Raises ValueError that says what is expected."""
        kind, slash, interval = text.partition("/")
        if kind not in KINDS or (slash and not (interval.isdigit() and int(interval))):
            raise ValueError(f"expected {', '.join(KINDS)}, or one of them with /K for --stream-interval K, got {text!r}")
        if slash and kind == "synthetic":
            raise ValueError(f"the synthetic engine has no stream interval, got {text!r}")
        return cls(kind, int(interval) if slash else 1)

    def __str__(self) -> str:
        return self.kind if self.interval == 1 else f"{self.kind}/{self.interval}"


def together(sides: list[Wanted]) -> list[list[Wanted]]:
    """The sides by start: of ``ALONE`` those next to each other share one engine."""
    starts: list[list[Wanted]] = []
    for wanted in sides:
        last = starts[-1][-1] if starts else None
        if last and {last.kind, wanted.kind} <= set(ALONE) and last.interval == wanted.interval:
            starts[-1].append(wanted)
        else:
            starts.append([wanted])
    return starts


@dataclass(frozen=True)
class Setup:
    """What all sides of a run share."""

    model: Path
    flags: list[str]
    """SGLang's."""
    agents: int
    """Most agents that a node is measured with."""
    clients: int
    step_seconds: float
    """Of the synthetic engine."""
    vocab: int


class Failed(Exception):
    """A side that did not start, or did not do what it was told."""


class Side(Protocol):
    """A side that runs. Every method raises Failed, or LoadError for a load."""

    def start(self) -> None:
        """Returns when it has answered a request."""

    def become(self, wanted: Wanted) -> None:
        """Be another of the sides that share one start (``together``)."""

    def scale(self, agents: int) -> None:
        """Go down to so many agents."""

    def outputs(self, prompts: list[list[int]], output: int) -> list[str]:
        """Greedy texts, one prompt after another."""

    def run(self, load: Load, started: Callable[[], None]) -> list[Done]:
        """Send a load; ``started`` is called just before."""

    def close(self) -> None:
        """End what it has started beside its marked processes."""


class Place:
    """A directory for one start of a side, a mark for its processes, and logs. Leaving it ends them all.

    HOME stays: what one start has compiled, the next finds.
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)
        # Short: the paths of unix sockets end at 107 bytes.
        self.root = Path(tempfile.mkdtemp(prefix="tp-", dir="/tmp"))

    @property
    def mark(self) -> str:
        return str(self.root)

    def environment(self, **more: str) -> dict[str, str]:
        """Of every process of the side."""
        outside = {key: value for key, value in engine_environment().items() if key != "SGLANG_LOGGING_CONFIG_PATH"}
        own = {processes.MARK: self.mark, **processes.KEEP_MARK, "HF_HUB_OFFLINE": "1", "TMPDIR": str(self.root)}
        return {**outside, **own, **more}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        processes.end(self.mark)
        shutil.rmtree(self.root, ignore_errors=True)


def make(wanted: Wanted, setup: Setup, place: Place) -> Side:
    """The side, not yet started."""
    from benchmarks.token_path.dynamo_side import DynamoSide
    from benchmarks.token_path.engine_side import EngineSide
    from benchmarks.token_path.node_side import NodeSide

    match wanted.kind:
        case kind if kind in ALONE:
            return EngineSide(wanted, setup, place)
        case "dynamo":
            return DynamoSide(wanted, setup, place)
    return NodeSide(wanted, setup, place)


def worker_flags(wanted: Wanted, setup: Setup) -> list[str]:
    """The same flags for ``dynamo.sglang``, sgnode and an engine alone."""
    interval = [] if wanted.interval == 1 else ["--stream-interval", str(wanted.interval)]
    return ["--model-path", str(setup.model), "--served-model-name", MODEL, *setup.flags, *interval]
