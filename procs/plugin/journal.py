"""Each program's output to systemd's journal under its own name (`journalctl -t sgnode-engine`), beside its log file.

From supervisord's loop in journald's native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL): no process, pipe or thread more,
and it never waits, as syslog(3) would. What journald can't take now waits here, bounded; past that it is counted and left out.
"""

import contextlib
import math
import re
import socket
from collections import Counter, deque
from typing import Any

from supervisor.loggers import Handler, LevelsByName

SOCKET = "/run/systemd/journal/socket"
LINE_BYTES = 48 * 1024
"""A longer line is cut into several, numbered by SGNODE_PART: what journald does with a service's output (LineMax=)."""
QUEUE_BYTES = 4 * 1024 * 1024
"""Lines that wait for a slow journald. They are in the log file as well."""
PRIORITIES = {b"DEBUG": 7, b"INFO": 6, b"WARN": 4, b"WARNING": 4, b"ERROR": 3, b"CRITICAL": 2, b"FATAL": 2}
"""syslog(3)'s numbers for the levels of our log lines, SGLang's and Dynamo's; anything else is INFO."""
LEVEL = re.compile(rb"\b(DEBUG|INFO|WARN|WARNING|ERROR|CRITICAL|FATAL)\b")
CONTINUED = (b" ", b"\t", b"Traceback (")
"""So begin the lines of a traceback: they have the priority of the line before."""
LEVEL_WITHIN = 64
"""Bytes at a line's beginning that a level is looked for in: after them, it is a word of the message."""


class Journal:
    """An entry of asyncore's socket_map in supervisord (duck-typed dispatcher): writable when journald takes lines again."""

    def __init__(self, node: str, socket_map: dict[int, Any], path: str = SOCKET) -> None:
        self._node = node
        self._path = path
        self._map = socket_map
        self._rest: dict[str, bytes] = {}
        self._last: dict[str, int] = {}
        """Priority of a process's line before."""
        self._queue: deque[bytes] = deque()
        self._bytes = 0
        self._lost: Counter[str] = Counter()
        self._socket: socket.socket | None = None
        self._connect()

    def take(self, process: str, pid: int, data: bytes) -> None:
        """What a process has written: whole lines go, the rest waits for its end. ``process``: engine, agent:0, ..."""
        *lines, rest = (self._rest.pop(process, b"") + data).split(b"\n")
        for line in lines:
            self.line(process, pid, line)
        if len(rest) > LINE_BYTES:
            self.line(process, pid, rest)
        elif rest:
            self._rest[process] = rest

    def end(self, process: str) -> None:
        """The process is gone: its last line may have no end."""
        if rest := self._rest.pop(process, b""):
            self.line(process, 0, rest)

    def line(self, process: str, pid: int, line: bytes, priority: int | None = None) -> None:
        """One line, or several when it is too long for one."""
        if priority is None:
            level = LEVEL.search(line[:LEVEL_WITHIN])
            if level is None and line.startswith(CONTINUED):
                priority = self._last.get(process, 6)
            else:
                priority = self._last[process] = PRIORITIES[level[1]] if level else 6
        head = f"PRIORITY={priority}\nSYSLOG_IDENTIFIER=sgnode-{process.replace(':', '-')}\nSGNODE_NODE={self._node}\n"
        head += f"SGNODE_PROCESS={process}\n" + (f"SYSLOG_PID={pid}\n" if pid else "")
        parts = math.ceil(len(line) / LINE_BYTES)
        for number in range(parts):
            part = line[number * LINE_BYTES : (number + 1) * LINE_BYTES].rstrip()
            if part:
                which = f"SGNODE_PART={number + 1}/{parts}\n" if parts > 1 else ""
                self._put(process, f"{head}{which}MESSAGE=".encode() + part + b"\n")

    def _put(self, process: str, datagram: bytes) -> None:
        if self._bytes + len(datagram) > QUEUE_BYTES:
            self._lost[process] += 1
            return
        self._queue.append(datagram)
        self._bytes += len(datagram)
        if len(self._queue) == 1:
            self._flush()

    def _flush(self) -> None:
        while self._queue:
            try:
                if self._socket is None:
                    self._connect()
                if self._socket is not None:
                    self._socket.send(self._queue[0])
            except BlockingIOError:
                return
            except OSError:
                # journald has taken away its end: a new connection at the next line. This one is in the log file.
                self._close()
            self._bytes -= len(self._queue.popleft())
        for process, count in list(self._lost.items()):
            del self._lost[process]
            self.line(process, 0, b"%d lines did not reach the journal; they are in the log file" % count, 4)

    def _connect(self) -> None:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            made.connect(self._path)
        except OSError:
            made.close()
            return
        self._socket = made
        self._map[made.fileno()] = self

    def _close(self) -> None:
        if self._socket is not None:
            self._map.pop(self._socket.fileno(), None)
            self._socket.close()
            self._socket = None

    # --- asyncore's side ---

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return bool(self._queue)

    def handle_write_event(self) -> None:
        self._flush()

    def handle_error(self) -> None:
        """A defect of ours must not end supervisord: no journal from here on."""
        self._close()


class OwnLog(Handler):  # type: ignore[misc]
    """supervisord's own log to the journal: starts, exits and signals of the programs."""

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal

    def emit(self, record: Any) -> None:
        with contextlib.suppress(Exception):
            text = str(record.asdict()["message"])
            priority = 6 if record.level <= LevelsByName.INFO else 4 if record.level <= LevelsByName.WARN else 3
            for line in text.splitlines():
                self._journal.line("supervisord", 0, line.encode(errors="replace"), priority)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing to close: the journal's socket lives as long as supervisord."""

    reopen = remove = close
