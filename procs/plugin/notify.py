"""sd_notify from supervisord's own pid, which is the one that systemd listens to (NotifyAccess=main)."""

import contextlib
import os
import socket

EXTEND_USEC = 30_000_000
"""How much longer systemd shall wait while the node loads or drains: repeated every second, so 30 s forgives a long pause."""


class Notify:
    """Datagrams to NOTIFY_SOCKET. Without one, and when systemd does not take them, nothing happens."""

    def __init__(self) -> None:
        path = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) if path else None
        watched = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._watchdog = bool(os.environ.get("WATCHDOG_USEC")) and watched
        self._ready = False

    def _send(self, *lines: str) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendto("\n".join(lines).encode(), self._address)

    def status(self, state: str, text: str, *, patience: bool) -> None:
        """STATUS= at each report, READY=1 once; with ``patience``, more time for what is going on."""
        lines = [f"STATUS={text}"]
        if state == "ready" and not self._ready:
            self._ready = True
            lines.append("READY=1")
        if patience:
            lines.append(f"EXTEND_TIMEOUT_USEC={EXTEND_USEC}")
        self._send(*lines)

    def stopping(self) -> None:
        self._send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={EXTEND_USEC}")

    def tick(self) -> None:
        """Every five seconds: supervisord's loop is alive."""
        if self._watchdog:
            self._send("WATCHDOG=1")
