"""What the console waits for before it says how the node is used."""

import json
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from procs.cli import console
from shared.config import NodeConfig


class Frontend(HTTPServer):
    """Answers /v1/models with ``said``, once it is something."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.said: bytes = b""
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Frontend

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.end_headers()
        self.wfile.write(self.server.said)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def frontend() -> Iterator[Frontend]:
    server = Frontend()
    yield server
    server.shutdown()
    server.server_close()


def node(port: int, **more: Any) -> NodeConfig:
    fields: dict[str, Any] = {"role": "aggregated", "http_port": port, **more}
    return NodeConfig(name="n", runtime_dir="/r", version="0", model_path="m", served_model_name="m", **fields)


def test_the_curl_line_is_shown_when_the_frontend_has_the_model(frontend: Frontend) -> None:
    config = node(frontend.server_port)
    for said in (b"", b"{}", json.dumps({"data": []}).encode()):
        frontend.said = said
        assert not console.answers(config)
    frontend.said = json.dumps({"data": [{"id": "m"}]}).encode()
    assert console.answers(config)


def test_a_frontend_that_is_not_there_is_waited_for_and_no_frontend_is_not(frontend: Frontend) -> None:
    port = frontend.server_port
    frontend.shutdown()
    frontend.server_close()
    assert not console.answers(node(port))
    assert console.answers(node(port, frontend=False))
    assert console.answers(node(port, role="prefill")), "nobody lists a prefill worker"
    assert console.answers(node(port, nnodes=2, node_rank=1, dist_init_addr="10.0.0.1:20000"))


@pytest.mark.parametrize(
    ("role", "path", "field"),
    [
        ("aggregated", "chat/completions", "messages"),
        ("embedding", "embeddings", "input"),
        ("image", "images/generations", "size"),
        ("video", "videos", "seconds"),
    ],
)
def test_the_curl_line_is_a_request_of_the_role(role: str, path: str, field: str) -> None:
    words = shlex.split(console.usage(node(8000, role=role)).partition("try:")[2])
    assert words[2] == f"http://127.0.0.1:8000/v1/{path}"
    body = json.loads(words[-1])
    assert body["model"] == "m" and field in body
