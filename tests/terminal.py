"""A program in a terminal of its own, and what stands on its screen (pyte is the emulator)."""

import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
import threading
from types import TracebackType

import pyte


class Terminal:
    """Runs a command in a pseudo-terminal of ``columns`` x ``lines``."""

    def __init__(self, command: list[str], environment: dict[str, str], *, columns: int = 80, lines: int = 24) -> None:
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._lock = threading.Lock()
        self.raw = b""
        self._master, slave = pty.openpty()
        self.resize(columns, lines)
        wanted = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            # Ctrl-C is a signal only on a controlling terminal; a shell's background would hand on to ignore it.
            ["env", "--default-signal=INT", "setsid", "--ctty", *command],
            env={**wanted, "TERM": "xterm-256color", "LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # the program has gone
                return
            with self._lock:
                self.raw += data
                self._stream.feed(data)

    def lines(self) -> list[str]:
        """The screen, without what is empty at the ends of lines."""
        with self._lock:
            return [line.rstrip() for line in self._screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.lines())

    def line(self, start: str) -> str:
        """The first line that begins so, spaces before it aside; empty when there is none."""
        return next((line.strip() for line in self.lines() if line.strip().startswith(start)), "")

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        with self._lock:
            self._screen.resize(lines, columns)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self._master)[3] & termios.ECHO)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(5)
        os.close(self._master)
