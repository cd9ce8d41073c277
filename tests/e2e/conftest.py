"""Fixtures on the real engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import CPU, Node

MODEL = "demo"


@pytest.fixture(scope="session")
def node(model: Path) -> Iterator[Node]:
    """One real node for test_serving, and for test_stop, which ends it. Its processes log every import they make."""
    with Node(str(model), "--served-model-name", MODEL, *CPU, env={"PYTHONPROFILEIMPORTTIME": "1"}) as node:
        temporary = node.root / "tmp"
        temporary.mkdir()
        node.environment["TMPDIR"] = str(temporary)
        yield node.start().wait_ready()
