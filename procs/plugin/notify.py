"""sd_notify from supervisord's own pid, which is the one that systemd listens to (NotifyAccess=main)."""

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

EXTEND_USEC = 30_000_000
"""How much longer systemd shall wait while the node loads or drains: repeated every second, so 30 s forgives a long pause."""
PATIENT_STATES = ("waiting", "starting", "loading", "warming", "draining")
"""Node states that take long on purpose: systemd is asked for more time while one lasts."""
LINE_LENGTH = 400
"""Of STATUS=: a line that a person reads in `systemctl status`."""


class Notify:
    """Datagrams to NOTIFY_SOCKET. Without one, and when systemd does not take them, nothing happens."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        path = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) if path else None
        watched = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = environ.get("WATCHDOG_USEC", "") if watched else ""
        self._every = int(usec) / 3e6 if usec.isdigit() and int(usec) else None
        self._beat_at = self._extend_at = 0.0
        self._said = ""
        self._ready = False

    @property
    def listening(self) -> bool:
        """The node is a service of systemd's."""
        return self._socket is not None

    def _send(self, *lines: str) -> None:
        if self._socket is not None and lines:
            with contextlib.suppress(OSError):
                self._socket.sendto("\n".join(lines).encode(), self._address)

    def say(self, text: str) -> None:
        """STATUS= alone."""
        self._said = text
        self._send(f"STATUS={text}")

    def report(self, document: Mapping[str, Any], *, stopping: bool) -> None:
        """The node's status: STATUS= at each change, READY=1 once, more time for a state that takes long on purpose."""
        state = str(document.get("state", ""))
        lines = []
        text = status_line(document)
        # A start that systemd gives up is stopped: why it failed stays to be read.
        if text != self._said and not (stopping and self._said.startswith("failed") and not self._ready):
            self._said = text
            lines.append(f"STATUS={text}")
        if state == "ready" and not self._ready:
            self._ready = True
            lines.append("READY=1")
        if stopping or state in PATIENT_STATES:
            lines.append(f"EXTEND_TIMEOUT_USEC={EXTEND_USEC}")
        self._send(*lines)

    def stopping(self) -> None:
        self._send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={EXTEND_USEC}")

    def round(self, *, stopping: bool) -> None:
        """In each round of supervisord's loop, once a second and more: it is alive, and a stop goes on without a coordinator."""
        now = time.monotonic()
        if self._every is not None and now - self._beat_at >= self._every:
            self._beat_at = now
            self._send("WATCHDOG=1")
        if stopping and now - self._extend_at >= 1.0:
            self._extend_at = now
            self._send(f"EXTEND_TIMEOUT_USEC={EXTEND_USEC}")


def status_line(document: Mapping[str, Any]) -> str:
    """State, reason and what is waited for, as one line for `systemctl status`."""
    state, reason, waiting = (" ".join(str(document.get(key, "")).split()) for key in ("state", "reason", "waiting_for"))
    if state == "ready" and not reason:
        reason = f"serving {document['model']}" if document.get("model") else ""
    if state == "waiting" and not reason:
        reason, waiting = waiting, ""
    said = reason if reason.startswith(f"{state}:") else ": ".join(part for part in (state, reason) if part)
    line = "; ".join(part for part in (said, f"waiting for {waiting}" if waiting else "") if part)
    return line if len(line) <= LINE_LENGTH else line[: LINE_LENGTH - 1] + "…"
