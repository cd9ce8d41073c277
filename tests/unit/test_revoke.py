"""Revoking what dead agents left: whose records, which file names, what etcd is asked, and what happens when it is down."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from procs.coordinator.revoke import Revoker, remove_files, revoke_lease
from shared import etcd, registrations
from shared.registrations import Registration
from tests.harness import gone, wait_for

WORKER = 0x87FC617AB2802F0D
HOLDER = """
import sys, time
from pathlib import Path
from shared.registrations import Registration, hold
hold(Path(sys.argv[1]), Registration("agent:0", int(sys.argv[2]), sys.argv[3], sys.argv[4]))
print("held", flush=True)
time.sleep(60)
"""


def store_with(root: Path, *keys: str) -> list[Path]:
    made = [root / "v1" / key for key in keys]
    for path in made:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return made


def test_only_keys_of_the_worker_and_its_adapters_go(tmp_path: Path) -> None:
    head = "dynamo%2Fbackend%2F"
    own = store_with(
        tmp_path, f"instances/{head}generate%2F{WORKER:x}", f"instances/{head}clear%5Fkv%5Fblocks%2F{WORKER:x}",
        f"mdc/{head}generate%2F{WORKER:x}", f"mdc/{head}generate%2F{WORKER:x}%2Fadapter",
    )  # fmt: skip
    others = store_with(
        tmp_path, f"instances/{head}generate%2F2fb950f3054e2659", f"instances/{head}generate%2F1{WORKER:x}",
        f"mdc/{head}generate%2F2fb950f3054e2659%2Fadapter", f"instances/{head}{WORKER:x}%2Fgenerate",
        f"mdc/.tmp_{WORKER:x}", "event_channels/namespace%2Fdynamo%2Fca013fa557bd2",
    )  # fmt: skip
    assert remove_files(tmp_path, WORKER) == 4
    assert [path.exists() for path in (*own, *others)] == [False] * 4 + [True] * 6
    assert remove_files(tmp_path, WORKER) == 0
    assert remove_files(tmp_path / "none", WORKER) == 0


def test_a_living_agents_records_stay_and_a_killed_ones_go(tmp_path: Path) -> None:
    [record] = store_with(tmp_path / "store", f"instances/a%2Fb%2Fgenerate%2F{WORKER:x}")
    arguments = [str(tmp_path), str(WORKER), "file", str(tmp_path / "store")]
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, *arguments], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    revoker = Revoker(tmp_path, {})
    revoker.revoke_all()
    assert record.exists()
    os.kill(holder.pid, signal.SIGKILL)
    wait_for("its end", lambda: gone(holder.pid), 5)
    revoker.revoke_all()
    assert not record.exists() and not list(registrations.abandoned(tmp_path))
    holder.wait(5)


class Etcd(HTTPServer):
    """etcd's JSON gateway as far as it is used here."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Gateway)
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.leases = {str(WORKER)}
        self.token = ""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Gateway(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Etcd

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        token = self.headers["Authorization"]
        self.server.asked.append((self.path, body, token))
        if self.path == "/v3/auth/authenticate":
            self.answer(200, {"token": "t-1"})
        elif self.server.token and token != self.server.token:
            self.answer(400, {"code": 3, "message": "etcdserver: user name is empty"})
        elif body["ID"] in self.server.leases:
            self.server.leases.remove(body["ID"])
            self.answer(200, {"header": {}})
        else:
            self.answer(404, {"code": 5, "message": "etcdserver: requested lease not found"})

    def answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Etcd]:
    made = Etcd()
    yield made
    made.shutdown()
    made.server_close()


def test_the_lease_is_revoked_at_the_first_endpoint_that_answers(server: Etcd) -> None:
    environ = {"ETCD_ENDPOINTS": f"http://127.0.0.1:1, {server.url}"}
    assert server.url in revoke_lease(WORKER, environ)
    assert server.asked == [("/v3/lease/revoke", {"ID": str(WORKER)}, None)]
    assert revoke_lease(WORKER, environ) == "", "gone already is as good"


def test_user_and_password_are_those_of_dynamo(server: Etcd) -> None:
    server.token = "t-1"
    environ = {"ETCD_ENDPOINTS": server.url, "ETCD_AUTH_USERNAME": "root"}
    with pytest.raises(ConnectionError, match="user name is empty"):
        revoke_lease(WORKER, environ)
    assert revoke_lease(WORKER, {**environ, "ETCD_AUTH_PASSWORD": "secret"})
    assert server.asked[-2:] == [
        ("/v3/auth/authenticate", {"name": "root", "password": "secret"}, None),
        ("/v3/lease/revoke", {"ID": str(WORKER)}, "t-1"),
    ]


def test_while_etcd_is_down_it_is_said_once_and_tried_again(
    tmp_path: Path, server: Etcd, caplog: pytest.LogCaptureFixture
) -> None:
    os.close(registrations.hold(tmp_path, Registration("agent:0", WORKER, "etcd")))  # as its end does
    environ = {"ETCD_ENDPOINTS": "http://127.0.0.1:1"}
    revoker = Revoker(tmp_path, environ)
    caplog.set_level("INFO")
    revoker.revoke_all()
    revoker.revoke_all()
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "127.0.0.1:1" in caplog.text
    environ["ETCD_ENDPOINTS"] = server.url
    revoker.revoke_all()
    assert not server.leases and "revoked its lease" in caplog.text
    assert not list(registrations.abandoned(tmp_path))


def test_endpoints_are_read_as_dynamo_reads_them() -> None:
    assert etcd.urls({}) == ["http://localhost:2379"]
    assert etcd.urls({"ETCD_ENDPOINTS": "https://a:1, b:2"}) == ["https://a:1", "http://b:2"]
