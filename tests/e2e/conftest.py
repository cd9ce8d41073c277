"""Fixtures on the real engine: a demo model made once, one node a module."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import CPU, SGNODE, Node

MODEL = "demo"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights, made by the command that users have."""
    path = tmp_path_factory.mktemp("models") / "demo-llama"
    subprocess.run([SGNODE, "demo-model", str(path)], check=True, capture_output=True, timeout=120)
    return path


@pytest.fixture(scope="module")
def node(model: Path) -> Iterator[Node]:
    """One real node, shared by a module's tests. Its processes log every import they make."""
    with Node(str(model), "--served-model-name", MODEL, *CPU, env={"PYTHONPROFILEIMPORTTIME": "1"}) as node:
        yield node.start().wait_ready()
