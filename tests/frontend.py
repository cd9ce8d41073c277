"""A Dynamo frontend of a cluster: outside every node, on a file discovery that the nodes share."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import requests

from tests.harness import wait_for

LOOPBACK = dict.fromkeys(("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST"), "127.0.0.1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Frontend:
    """``python -m dynamo.frontend``, as clusters run it. ``migration_limit`` 0: a stream ends with its worker."""

    def __init__(
        self, store: Path, migration_limit: int = 3, *, backend: str = "file", env: dict[str, str] | None = None
    ) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        command = [sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]
        command += ["--discovery-backend", backend, "--request-plane", "tcp", "--event-plane", "zmq"]
        command += ["--migration-limit", str(migration_limit)]
        environment = {**os.environ, **LOOPBACK, "DYN_FILE_KV": str(store), "HOME": str(store.parent), **(env or {})}
        self.log = store.parent / f"frontend-{port}.log"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )

    def wait_model(self, model: str, seconds: float = 60.0) -> "Frontend":
        """Wait until it lists the model."""

        def listed() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            try:
                models = requests.get(f"{self.url}/v1/models", timeout=5).json()
            except requests.ConnectionError:
                return False
            return model in [entry["id"] for entry in models.get("data", [])]

        wait_for(f"{model} at the frontend", listed, seconds, every=0.1)
        return self

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def __enter__(self) -> "Frontend":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
