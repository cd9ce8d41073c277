"""Fixtures on the real engine: one node a module."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import CPU, Node

MODEL = "demo"


@pytest.fixture(scope="module")
def node(model: Path) -> Iterator[Node]:
    """One real node, shared by a module's tests. Its processes log every import they make."""
    with Node(str(model), "--served-model-name", MODEL, *CPU, env={"PYTHONPROFILEIMPORTTIME": "1"}) as node:
        yield node.start().wait_ready()
