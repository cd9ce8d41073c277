"""Calls to the node's supervisord: XML-RPC over its unix socket, each with a deadline. Imports nothing of supervisor's."""

import http.client
import socket
import xmlrpc.client
from pathlib import Path
from typing import Any

from shared.config import SUPERVISOR_SOCKET

SHUTDOWN_STATE = 6
"""Fault code of every stock method while supervisord stops (supervisor.xmlrpc.Faults)."""
BAD_NAME = 10
ALREADY_STARTED = 60
NOT_RUNNING = 70


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _Transport(xmlrpc.client.Transport):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__()
        self._path = path
        self._timeout = timeout

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        return _Connection(self._path, self._timeout)


def call(runtime_dir: Path, method: str, *args: Any, timeout: float = 5.0) -> Any:
    """Call a method such as ``supervisor.startProcess`` or ``sgnode.node``; a process is "engine", "agent:0" or "agent:*".

    ``timeout`` in seconds, for each step of the call. Raises OSError when supervisord is gone (FileNotFoundError or
    ConnectionRefusedError) or does not answer in time, http.client.HTTPException when it goes in mid-answer, and
    xmlrpc.client.Fault with its answer when it refuses.
    """
    transport = _Transport(str(runtime_dir / SUPERVISOR_SOCKET), timeout)
    with xmlrpc.client.ServerProxy("http://localhost/RPC2", transport=transport, allow_none=True) as proxy:
        return getattr(proxy, method)(*args)
