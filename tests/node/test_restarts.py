"""Engine deaths and restarts, many of them: nothing that the node holds may grow."""

import signal
from collections.abc import Callable

import pytest

from tests.harness import Node, send, wait_for
from tests.leftovers import flat, held, marked, marks

SETTLED = 10
"""Restarts after which caches and logs have their size."""


@pytest.mark.soak
def test_a_hundred_engines_leave_nothing(
    make_node: Callable[..., Node], rounds: Callable[[int], int], figures: Callable[..., None]
) -> None:
    node = make_node("--agents", "2", "--drain-grace", "0", "--no-frontend", dials="load_seconds=0.05")
    temporary = node.root / "tmp"
    temporary.mkdir()
    node.environment["TMPDIR"] = str(temporary)
    node.start().wait_ready(40)
    seen = marks(node)
    last = rounds(100) + 1
    before = held(node)
    for number in range(1, last + 1):
        old = node.status()["incarnation"]
        if number % 2:
            send(node.pid("engine"), signal.SIGKILL)
        else:  # by hand: it forgets the deaths, of which five would be a crash loop
            assert node.sgnode("restart", "engine").returncode == 0
        wait_for("the next engine", lambda old=old: node.status()["incarnation"] > old, 20)
        node.wait_ready(20)
        seen |= marks(node)
        if number == (SETTLED if last > SETTLED else 1):
            before = held(node)
        if number % 10 == 0 or number == last:
            figures(restarts=number, **held(node).figures())
    assert len(seen) == last + 1, "each life has its own"
    flat(before, held(node))
    assert not marked(seen - marks(node))
