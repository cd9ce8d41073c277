"""SIGTERM on a real node with real streams running: withdrawn at once, all complete, nothing stays."""

import time

from tests.e2e.conftest import MODEL
from tests.harness import Node, instances, nothing_left, running, wait_for
from tests.streams import Streams

STREAMS = 32
TOKENS = 1950
"""32 of these fit the 65,536 tokens of the cache, and keep two cores busy for well over 10 s."""


def test_sigterm_with_streams_running_loses_none_and_leaves_nothing(node: Node, streams: Streams) -> None:
    results = streams.start(node.url, MODEL, STREAMS, TOKENS)
    streams.flowing(results)
    running(node, STREAMS)
    asked = time.monotonic()
    node.terminate()
    wait_for("withdrawn", lambda: not instances(node), 5, every=0.002)
    withdrawn = time.monotonic() - asked
    wait_for("draining seen", lambda: node.status().get("reason", "").startswith("draining: 32 streams left"), 10)
    streams.join()
    lasted = [r.ended - asked for r in results]
    print(f"withdrawn {withdrawn * 1e3:.1f} ms after SIGTERM; streams went on for {min(lasted):.1f} to {max(lasted):.1f} s")
    assert all(r.complete and r.tokens == TOKENS for r in results), results
    assert min(lasted) > 10, "the streams had not enough to go: the test proves nothing"
    assert withdrawn < 0.2
    assert node.wait_stopped(30) == 0
    nothing_left(node)
    assert list((node.root / "tmp").iterdir()) == []
