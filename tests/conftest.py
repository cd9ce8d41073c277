"""Fixtures that several kinds of test share."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.collector import Collector
from tests.harness import SGNODE
from tests.streams import Streams

SOAK = bool(os.environ.get("SGNODE_SOAK"))
"""Set by `make soak`: rounds are repeated and their figures kept."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights, made by the command that users have."""
    path = tmp_path_factory.mktemp("models") / "demo-llama"
    subprocess.run([SGNODE, "demo-model", str(path)], check=True, capture_output=True, timeout=120)
    return path


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as made:
        yield made


@pytest.fixture
def streams() -> Iterator[Streams]:
    """Streams through a frontend, in a thread of their own."""
    with Streams() as made:
        yield made


@pytest.fixture(scope="session")
def rounds() -> Callable[[int], int]:
    """``rounds(20)``: 20 in a soak, otherwise 1."""
    return lambda soak: soak if SOAK else 1


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keeps what a round measured: ``figures(withdrawn_ms=41)`` prints it, and a soak writes it to SGNODE_SOAK_RESULTS."""

    def keep(**measured: float | str) -> None:
        line = json.dumps({"test": request.node.name, "at": round(time.time()), **measured})
        print(line)
        if SOAK and (path := os.environ.get("SGNODE_SOAK_RESULTS")):
            with Path(path).open("a") as results:
                results.write(line + "\n")

    return keep
