"""A real etcd on loopback (Debian's etcd-server), stopped and started again on the same data."""

import http.client
import json
import subprocess
from base64 import b64decode, b64encode
from pathlib import Path

from tests.frontend import LOOPBACK, free_port
from tests.harness import wait_for


class Etcd:
    """``environment`` is what a node and a frontend need to find it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._peer = f"http://127.0.0.1:{free_port()}"
        self.environment = {"ETCD_ENDPOINTS": self.url, **LOOPBACK}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Etcd":
        command = ["etcd", "--data-dir", str(self.root / "etcd"), "--initial-cluster", f"default={self._peer}"]
        command += ["--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        command += ["--listen-peer-urls", self._peer, "--initial-advertise-peer-urls", self._peer]
        with (self.root / "etcd.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for("etcd", self.answers, 20)
        return self

    def stop(self) -> None:
        """Proven: nothing listens afterwards."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)
            assert not self.answers()

    def answers(self) -> bool:
        try:
            self.keys("v1/")
        except (OSError, http.client.HTTPException, KeyError, ValueError):
            return False
        return True

    def keys(self, prefix: str) -> list[str]:
        """Keys as text. Raises OSError while it is down."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        body = {"key": b64encode(prefix.encode()).decode(), "range_end": b64encode(end.encode()).decode(), "keys_only": True}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("POST", "/v3/kv/range", json.dumps(body))
            answer = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        if "header" not in answer:
            raise KeyError("header")
        return [_text(entry["key"]) for entry in answer.get("kvs", [])]

    def instances(self) -> list[str]:
        """Worker ids in hexadecimal that are registered for the generate endpoint."""
        return [key.rpartition("/")[2] for key in self.keys("v1/instances/") if "/generate/" in key]

    def __enter__(self) -> "Etcd":
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)


def _text(encoded: str) -> str:
    return b64decode(encoded).decode()
