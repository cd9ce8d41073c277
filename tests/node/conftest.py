"""Fixtures on process trees with the synthetic engine."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import Node

MODEL = "synthetic"


@pytest.fixture
def make_node(model: Path) -> Iterator[Callable[..., Node]]:
    """Makes nodes with a synthetic engine of the given dials; all are ended afterwards."""
    nodes: list[Node] = []

    def make(*arguments: str, dials: str = "step_seconds=0.01", name: str = "test") -> Node:
        node = Node(str(model), "--served-model-name", MODEL, "--synthetic", dials, *arguments, name=name)
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.close()
