"""`sgnode sleep` and `sgnode wake` against a stand-in node: what is asked of it, in which order, and what an operator reads."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from procs.cli import sleep as module
from procs.cli.sleep import sleep, wake
from shared import config as configuration
from shared import rolling
from shared.config import NodeConfig
from shared.errors import NodeError
from shared.state import State


class Node:
    """A node that does as it is told: its HTTP port is real, its supervisord is not."""

    def __init__(self) -> None:
        self.state = State.READY
        self.calls: list[str] = []
        self.answer: tuple[int, bytes] = (200, b'{"status":"ok"}')

    def ask(self, path: str, body: bytes) -> tuple[int, bytes]:
        self.calls.append(f"{path} {body.decode()}")
        if self.answer[0] == 200:
            self.state = State.SLEEPING if "release" in path else State.DRAINED
        return self.answer

    def drained(self, _: Path, why: str) -> None:
        self.calls.append(f"drain: {why}")
        self.state = State.DRAINED

    def resume(self, _: Path) -> None:
        self.calls.append("resume")
        self.state = State.READY

    def document(self, _: Path) -> dict[str, Any]:
        return {"state": self.state}

    def until(self, _: Path, condition: Any, seconds: float, what: str, say: Any) -> Any:
        if not condition({"state": self.state}):
            raise NodeError(f"not within {seconds:.0f} s: {what}")
        return {"state": self.state}


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    made = Node()

    class Port(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, body = made.ask(self.path, self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Port) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        configure(tmp_path, server.server_port)
        monkeypatch.setattr(module, "directory_of", lambda _: tmp_path)
        monkeypatch.setattr(module, "drained", made.drained)
        for name in ("document", "resume", "until"):
            monkeypatch.setattr(rolling, name, getattr(made, name))
        yield made
        server.shutdown()


def configure(directory: Path, port: int, **changes: Any) -> None:
    base = NodeConfig(
        name="t",
        runtime_dir=str(directory),
        version="0",
        role="aggregated",
        model_path="/m",
        served_model_name="m",
        system_port=port,
    )
    configuration.save(msgspec.structs.replace(base, **changes))


RELEASE, RESUME = "/engine/release_memory_occupation {}", "/engine/resume_memory_occupation {}"


def test_sleep_drains_before_it_releases(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    assert sleep([]) == 0
    assert node.calls == ["drain: asleep by `sgnode sleep`", RELEASE]
    assert "`sgnode wake`" in capsys.readouterr().out


def test_sleep_in_sleep_does_nothing(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.state = State.SLEEPING
    assert sleep([]) == 0 and node.calls == [] and "asleep already" in capsys.readouterr().out


def test_wake_takes_the_memory_before_it_serves(node: Node) -> None:
    sleep([])
    node.calls.clear()
    assert wake([]) == 0
    assert node.calls == [RESUME, "resume"] and node.state == State.READY


def test_wake_of_a_node_that_is_only_drained_asks_the_engine_for_nothing(node: Node) -> None:
    node.state = State.DRAINED
    assert wake([]) == 0 and node.calls == ["resume"]


@pytest.mark.parametrize(("command", "state"), [(sleep, State.READY), (wake, State.SLEEPING)])
def test_what_the_engine_refuses_is_one_error_with_its_words_and_the_way_back(node: Node, command: Any, state: State) -> None:
    node.state = state
    node.answer = (500, b'{"error":"Handler error","message":"Python callback failed: ValueError: 2 requests are running"}')
    with pytest.raises(NodeError, match=r"2 requests are running.*`sgnode resume`"):
        command([])
    assert "resume" not in node.calls, "a node whose memory is away must not serve"


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_a_port_that_is_bound_everywhere_is_asked_on_loopback(node: Node, tmp_path: Path, host: str) -> None:
    configure(tmp_path, configuration.load(tmp_path).system_port, system_host=host)
    assert sleep([]) == 0


def test_a_port_that_doesn_t_answer_is_named(node: Node, tmp_path: Path) -> None:
    configure(tmp_path, 1)
    with pytest.raises(NodeError, match=r"http://127\.0\.0\.1:1/engine/release_memory_occupation: .*is the prober up"):
        sleep([])


@pytest.mark.parametrize("command", [sleep, wake])
def test_a_follower_sends_the_operator_to_rank_0(node: Node, tmp_path: Path, command: Any) -> None:
    configure(tmp_path, 1, nnodes=2, node_rank=1)
    with pytest.raises(NodeError, match=r"rank 1 of 2.*rank 0"):
        command([])
    assert node.calls == []


@pytest.mark.parametrize("role", ["image", "video", "mm_encode"])
def test_a_role_that_can_t_sleep_is_refused_before_anything_is_drained(node: Node, tmp_path: Path, role: str) -> None:
    configure(tmp_path, 1, role=role)
    with pytest.raises(NodeError, match=f"role {role} can't release its memory") as caught:
        sleep([])
    assert node.calls == [] and "\n" not in str(caught.value)
