"""The side ``dynamo``: ``python -m dynamo.frontend`` and ``python -m dynamo.sglang``, as one machine runs them."""

import sys

from benchmarks.token_path.http_side import HttpSide
from benchmarks.token_path.side import worker_flags

PLANES = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
LOOPBACK = ("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST", "DYN_SYSTEM_HOST")


class DynamoSide(HttpSide):
    """See side.Side."""

    def _launch(self) -> None:
        python = [sys.executable, "-W", "ignore", "-m"]
        around = {**dict.fromkeys(LOOPBACK, "127.0.0.1"), "DYN_FILE_KV": str(self._place.root / "discovery")}
        address = ["--http-host", "127.0.0.1", "--http-port", str(self._port)]
        self._spawn("frontend", [*python, "dynamo.frontend", *address, *PLANES], **around)
        self._spawn("worker", [*python, "dynamo.sglang", *worker_flags(self._wanted, self._setup), *PLANES], **around)
