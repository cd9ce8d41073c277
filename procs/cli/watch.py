"""`sgnode status --watch`: the status again and again, on a terminal as a live picture. Only this and view.py need rich."""

import json
import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from procs.cli.status import GONE, NOT_RUNNING, code_of, document_of
from shared.errors import NodeError
from shared.table import render

SILENT_SECONDS = 2.0
"""supervisord answers within milliseconds; a question that waits for longer is said."""
LEAVES = (b"q", b"Q", b"\x03", b"\x04")


@dataclass(frozen=True)
class Answer:
    """What was found at one look. ``document`` is None when no node answers, and ``trouble`` says why."""

    document: dict[str, Any] | None
    trouble: str = ""
    gone: bool = False
    """Not only slow."""


def look(directory: Path) -> Answer:
    """Ask the node; takes as long as supervisord does, 5 s at most."""
    try:
        return Answer(document_of(directory))
    except TimeoutError:
        return Answer(None, "supervisord does not answer")
    except GONE:
        return Answer(None, f"no node is running in {directory}; waiting for one", gone=True)
    except NodeError as error:
        return Answer(None, str(error))


def watch(directory: Path, seconds: float, *, as_json: bool) -> int:
    """Until q or Ctrl-C; the exit code is that of `sgnode status` at that time."""
    live = sys.stdout.isatty() and not as_json and os.environ.get("TERM", "dumb") != "dumb"
    return _Live(directory, seconds).run() if live else _plain(directory, seconds, as_json=as_json)


def _plain(directory: Path, seconds: float, *, as_json: bool) -> int:
    """The same text as without --watch, each time with the time before it."""
    code = NOT_RUNNING
    try:
        while True:
            began = time.monotonic()
            answer = look(directory)
            code = code_of(answer.document)
            if as_json:
                print(json.dumps(answer.document or {}), flush=True)
            else:
                text = answer.trouble if answer.document is None else render(answer.document)
                print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}\n{text}\n", flush=True)
            time.sleep(max(0.0, began + seconds - time.monotonic()))
    except KeyboardInterrupt:
        return code


class _Asker(threading.Thread):
    """Asks the node in a thread of its own: a supervisord that hangs must not freeze the picture."""

    def __init__(self, directory: Path, seconds: float, news: Callable[[], None]) -> None:
        super().__init__(name="asker", daemon=True)
        self._directory, self._seconds, self._news = directory, seconds, news
        self.answers: deque[Answer] = deque()
        self.asked_at: float | None = None
        """Since when the question that waits does (monotonic seconds)."""

    def run(self) -> None:
        while True:
            began = self.asked_at = time.monotonic()
            answer = look(self._directory)
            self.asked_at = None
            self.answers.append(answer)
            self._news()
            time.sleep(max(0.0, began + self._seconds - time.monotonic()))


class _Live:
    """The terminal: alternate screen, keys, sizes, and the picture whenever there is news."""

    def __init__(self, directory: Path, seconds: float) -> None:
        from rich.console import Console
        from rich.live import Live

        from procs.cli.view import ASCII, HISTORY, UNICODE, Seen

        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._asker = _Asker(directory, seconds, self._poke)
        self._console = Console(highlight=False)
        self._glyphs = UNICODE if self._console.encoding.startswith("utf") else ASCII
        self._live = Live(console=self._console, screen=True, auto_refresh=False)
        self._seen = Seen(every=seconds)
        self._rates: deque[float] = deque(maxlen=HISTORY)
        self._document: dict[str, Any] = {}
        self._trouble = ""
        self._gone_at: float | None = time.time()
        self._seconds = seconds

    def _poke(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._wake, b".")

    def run(self) -> int:
        leave = False
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _interrupt)
        signal.signal(signal.SIGWINCH, lambda *_: self._poke())
        # Stopped by Ctrl-Z it would leave the shell its alternate screen.
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        with suppress(KeyboardInterrupt), ExitStack() as stack:
            keys = _keys(stack)
            stack.enter_context(self._live)
            self._asker.start()
            while not leave:
                self._draw()
                ready, _, _ = select.select([self._woken, *keys], [], [], 1.0)
                if self._woken in ready:
                    os.read(self._woken, 4096)
                for key in keys:
                    if key in ready:
                        leave = os.read(key, 16)[:1] in (*LEAVES, b"")
                self._take()
        return NOT_RUNNING if self._gone_at is not None else code_of(self._document)

    def _take(self) -> None:
        while self._asker.answers:
            answer = self._asker.answers.popleft()
            self._trouble = answer.trouble
            if answer.document is None:
                if answer.gone and self._gone_at is None:
                    self._gone_at = time.time()
            else:
                self._document, self._gone_at = answer.document, None
                rate = answer.document.get("tokens_per_s")
                self._rates.append(rate or 0.0)

    def _draw(self) -> None:
        from rich.console import Group

        from procs.cli.view import picture

        asked_at, trouble = self._asker.asked_at, self._trouble
        if asked_at is not None and (waits := time.monotonic() - asked_at) > SILENT_SECONDS:
            trouble = f"no answer from supervisord for {waits:.0f} s"
        seen = self._seen
        seen.trouble, seen.rates, seen.gone_at = trouble, list(self._rates), self._gone_at
        width, height = self._console.size
        lines = picture(self._document, seen, width=width, height=height, glyphs=self._glyphs)
        self._live.update(Group(*lines), refresh=True)


def _keys(stack: ExitStack) -> list[int]:
    """Standard input, each key at once and none shown, until the stack is left; nothing when it is no terminal."""
    if not sys.stdin.isatty():
        return []
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    stack.callback(termios.tcsetattr, keyboard, termios.TCSADRAIN, before)
    tty.setcbreak(keyboard)
    return [keyboard]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
