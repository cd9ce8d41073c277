"""More requests than the engine runs, a limit on them, a client that does not read: each costs only itself."""

import fcntl
import json
import os
import resource
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.frontend import Frontend
from tests.harness import Node, instances, running, wait_for
from tests.node.conftest import MODEL
from tests.streams import FOREVER, Result, Streams

Make = Callable[..., Node]
REQUESTS = 2000
RUNNING = 64
"""Requests in one step of the engine, as --max-running-requests has them."""
QUEUED = 16
"""What Dynamo 1.6.1 admits beyond --engine-request-limit: the queue of its request plane."""
BOUND_MB = 150
"""Growth of a process that thousands of requests go through at once; what is kept for each is some kilobytes."""


@pytest.fixture(scope="module", autouse=True)
def descriptors() -> Iterator[None]:
    """Enough of them, here and in the nodes that are started."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * REQUESTS
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"{wanted} descriptors are needed, {hard} are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def memory(node: Node) -> dict[str, float]:
    """Resident megabytes of the processes that every token goes through, as ``sgnode status --json`` has them."""
    rows = json.loads(node.sgnode("status", "--json").stdout)["processes"]
    return {row["name"]: row["rss_mb"] for row in rows if row["name"] in ("agent:0", "engine")}


def is_bounded(before: dict[str, float], after: dict[str, float], megabytes: float) -> None:
    growth = {name: round(after[name] - before[name], 1) for name in before}
    print(f"growth in MB: {growth}")
    assert max(growth.values()) < megabytes, growth


def idle(node: Node) -> None:
    """Wait until nothing of what was asked for is left in it."""

    def is_idle() -> bool:
        rows = [node.process_row(name).get("numbers", {}) for name in ("engine", "agent:0")]
        return all(row.get("inflight") == 0 for row in rows)

    wait_for("nothing in flight", is_idle, 60)


# --- more than the engine runs ---------------------------------------------------------------------------------------


def test_two_thousand_requests_at_once_are_all_answered(make_node: Make) -> None:
    node = make_node(dials=f"step_seconds=0.01,max_running_requests={RUNNING}").start().wait_ready(60)
    before = memory(node)
    with Streams() as streams:
        results = streams.start(node.url, MODEL, REQUESTS, 5)
        wait_for("a crowd in the engine", lambda: node.status().get("inflight", 0) > 2 * RUNNING, 60)
        crowded = memory(node)
        streams.join()
    bad = [result for result in results if not (result.complete and result.tokens == 5)]
    assert len(results) == REQUESTS and not bad, (len(bad), bad[:3])
    idle(node)
    is_bounded(before, crowded, BOUND_MB)
    settled = memory(node)
    is_bounded(before, settled, BOUND_MB)
    # The same once more takes nothing that the first did not.
    with Streams() as streams:
        streams.start(node.url, MODEL, REQUESTS, 5)
        assert all(result.complete for result in streams.join())
    idle(node)
    is_bounded(settled, memory(node), BOUND_MB / 3)
    assert node.status()["incarnation"] == 1 and node.process_row("agent:0")["restarts"] == 0


# --- a limit ---------------------------------------------------------------------------------------------------------


def test_past_the_limit_a_request_is_refused_while_the_others_run(make_node: Make) -> None:
    """Those that run have no end: whoever is refused did not wait for one of them."""
    node = make_node("--engine-request-limit", str(RUNNING), dials="step_seconds=0.05").start().wait_ready(60)
    crowd = 3 * RUNNING
    with Streams() as streams:
        results = streams.start(node.url, MODEL, crowd, FOREVER)
        wait_for("all that it runs", lambda: sum(r.first > 0 for r in results) == RUNNING, 60)
        wait_for("refusals", lambda: sum(r.ended > 0 for r in results) >= crowd - RUNNING - QUEUED, 60)
        refused = [result for result in results if result.ended]
        assert {result.status for result in refused} == {529}, refused[:3]
        assert all("Service temporarily overloaded" in result.error for result in refused)
        assert len(refused) <= crowd - RUNNING, "whoever has a token is not refused"
        running(node, RUNNING)
    idle(node)
    with Streams() as streams:
        streams.start(node.url, MODEL, RUNNING // 2, 5)
        assert all(result.complete for result in streams.join()), "there is room again"


def test_another_node_takes_the_surplus(make_node: Make, tmp_path: Path) -> None:
    store = tmp_path / "store"
    os.environ["DYN_FILE_KV"] = str(store)  # as the nodes' environment is a copy of this process's
    try:
        limited = make_node("--no-frontend", "--engine-request-limit", str(RUNNING), dials="step_seconds=0.05", name="limited")
        open_one = make_node("--no-frontend", dials="step_seconds=0.05", name="open")
    finally:
        del os.environ["DYN_FILE_KV"]
    for node in (limited, open_one):
        node.start()
    for node in (limited, open_one):
        node.wait_ready(60)
    with Frontend(store, 3) as frontend, Streams() as streams:
        frontend.wait_model(MODEL)
        wait_for("both workers", lambda: len(instances(limited, store)) == 2, 20)
        results = streams.start(frontend.url, MODEL, 6 * RUNNING, 40)
        streams.join()
    bad = [result for result in results if not (result.complete and result.tokens == 40)]
    assert not bad, (len(bad), bad[:3])
    served = {node.name: node.process_row("agent:0")["numbers"]["streams_total"] for node in (limited, open_one)}
    assert sum(served.values()) == 6 * RUNNING, served
    assert served["open"] > served["limited"] >= RUNNING, served


# --- a client that does not read -------------------------------------------------------------------------------------

SAMPLES = 64
"""Of the one request whose client does not read: so many streams on one connection fill its buffers in seconds."""
NAME = "synthetic-" + "x" * 190
"""Every chunk names the model: long ones fill the buffers sooner."""


class SlowReader:
    """A client with a small receive buffer that asks for a stream and reads nothing of it."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.connect((host, int(port)))
        body = {"model": NAME, "prompt": [21, 30, 40], "max_tokens": FOREVER, "n": SAMPLES, "stream": True}
        data = json.dumps({**body, "ignore_eos": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        self._socket.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        self._seen: tuple[int, float] = (0, 0.0)

    def waiting(self) -> int:
        """Bytes that the kernel keeps for it: not read here, and not taken off the server's hands."""
        unread = struct.unpack("i", fcntl.ioctl(self._socket, termios.FIONREAD, bytes(4)))[0]
        ours, theirs = self._socket.getsockname()[1], self._socket.getpeername()[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if (int(fields[1].split(":")[1], 16), int(fields[2].split(":")[1], 16)) == (theirs, ours):
                unread += int(fields[4].split(":")[0], 16)
        return int(unread)

    def is_stuck(self) -> bool:
        """The server has not been able to write to it for a second."""
        now, waiting = time.monotonic(), self.waiting()
        if waiting != self._seen[0]:
            self._seen = (waiting, now)
        return waiting > 0 and now - self._seen[1] > 1.0

    def close(self) -> None:
        self._socket.close()


def test_a_client_that_does_not_read_costs_only_itself(make_node: Make) -> None:
    node = make_node("--served-model-name", NAME, dials="step_seconds=0.03").start().wait_ready(60)
    others = RUNNING - 1
    with Streams() as streams:
        results = streams.start(node.url, NAME, others, FOREVER)
        streams.flowing(results)
        slow = SlowReader(node.url)
        wait_for("the slow client's buffers full", slow.is_stuck, 120, every=0.1)
        before, waiting = memory(node), slow.waiting()
        progressed(results, 60)
        assert slow.waiting() == waiting, "nothing was written to it all the time"
        is_bounded(before, memory(node), 10)
        assert not [result for result in results if result.ended]
        running(node, others + SAMPLES)
        slow.close()
        wait_for("the slow one's requests gone", lambda: node.status()["inflight"] == others, 30)
        progressed(results, 5)
    idle(node)


def progressed(results: list[Result], chunks: int) -> None:
    """Wait until every stream has had so many chunks more; none may be left behind meanwhile."""
    start = [result.chunks for result in results]

    def gained() -> list[int]:
        return [result.chunks - first for result, first in zip(results, start, strict=True)]

    wait_for(f"{chunks} chunks more on every stream", lambda: min(gained()) >= chunks, 60)
    assert max(gained()) < 3 * chunks, sorted(gained())
