"""supervisord's log files on a disk that may be full: what can't be written is counted and said, and costs nothing else.

supervisor 4.3's own handler prints a traceback to standard error for every such line, can lose its file for good in a rotation,
and cuts the line that is just being written there.
"""

import contextlib
import errno
import os
import sys
import weakref
from pathlib import Path
from typing import Any, ClassVar

from supervisor import loggers

from shared import logs

MODE = 0o600
LINE_SLACK = 1024 * 1024
"""A rotation waits for the end of a line, for so many bytes at most."""
LEVELS = {"CRIT": "CRITICAL", "ERRO": "ERROR", "DEBG": "DEBUG", "TRAC": "TRACE", "BLAT": "TRACE"}
"""supervisor's short names."""
ADVICE = "; make room there. Streams go on, and so do the logs then"
ROOM_BYTES = 64 << 10
"""Free on the file system before a file that found no room is written to again."""


class LogFile(loggers.Handler):  # type: ignore[misc]
    """Takes the place of supervisor's RotatingFileHandler: the same arguments, and no method of it raises."""

    all: ClassVar["weakref.WeakSet[LogFile]"] = weakref.WeakSet()

    def __init__(self, filename: str, mode: str = "ab", maxBytes: int = 0, backupCount: int = 0) -> None:
        super().__init__()
        self.baseFilename = filename
        self.mode = mode
        self.maxBytes = maxBytes
        self.backupCount = backupCount
        self.trouble = ""
        self._descriptor = -1
        self._size = 0
        self._whole = 0
        """Bytes up to the end of the last whole line."""
        self._lost = 0
        self._skipping = False
        """The rest of a line whose beginning was lost is to come."""
        LogFile.all.add(self)
        self._open()

    # --- what supervisor calls ---

    def emit(self, record: Any) -> None:
        if isinstance(record.msg, bytes) and self.fmt == "%(message)s" and not record.kw:
            data = record.msg
        elif logs.format_of(os.environ) == logs.JSONL:
            said = record.asdict()
            data = logs.line(LEVELS.get(said["levelname"], said["levelname"]), str(said["message"]))
        else:
            data = (self.fmt % record.asdict()).encode(errors="replace")
        self.write(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):  # ENOSPC may come as late as here
                os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        # supervisor 4.3 makes a new handler at each start of a process and just drops the last one.
        self.close()

    def reopen(self) -> None:
        self.close()
        self._open()

    def remove(self) -> None:
        self.close()
        with contextlib.suppress(OSError):
            os.remove(self.baseFilename)

    # --- writing ---

    def write(self, data: bytes) -> None:
        """What finds no room is lost, in whole lines; the next write says how much."""
        if self._skipping:
            rest, end, data = data.partition(b"\n")
            self._lost += len(rest) + len(end)
            self._skipping = not end
        if not data:
            return
        if (self._lost and not self.retry()) or not self._put(data):
            self._lost += len(data)
            self._skipping = not data.endswith(b"\n")
        elif self._size >= self.maxBytes > 0 and (self._size == self._whole or self._size > self.maxBytes + LINE_SLACK):
            self._roll()

    def retry(self) -> bool:
        """Say in the file what is missing. False while there is no room for that."""
        if not self._lost:
            return True
        if self.trouble and not self._room():
            return False
        words = f"{self._lost} bytes are missing here: {self.trouble or 'not written'}"
        if self._descriptor < 0:
            self._open()
        if not self._put(logs.line("WARN", words)):
            return False
        self._lost = 0
        self._say("")
        return True

    def _room(self) -> bool:
        """More than the page that a cut line gave back: a full disk would else be said to have room, and again not to."""
        try:
            found = os.statvfs(Path(self.baseFilename).parent)
        except OSError:
            return True  # the write says what is wrong
        return found.f_bavail * found.f_frsize >= ROOM_BYTES

    def _put(self, data: bytes) -> bool:
        """All of it, or nothing but what ends a line."""
        done = 0
        try:
            while done < len(data):
                if self._descriptor < 0:
                    raise OSError(errno.EBADF, "it could not be opened")
                done += os.write(self._descriptor, data[done:])
        except OSError as error:
            self._say(error.strerror or str(error))
            self._cut()
            return False
        if end := data.rfind(b"\n") + 1:
            self._whole = self._size + end
        self._size += len(data)
        return True

    def _cut(self) -> None:
        """Half a line would be no JSON, and the note would follow it."""
        if self._descriptor >= 0:
            self._lost += self._size - self._whole
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._whole)
            self._size = self._whole

    def _open(self) -> None:
        try:
            descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, MODE)
        except OSError as error:
            self._say(error.strerror or str(error))
            return
        self.close()
        self._descriptor = descriptor
        self._size = self._whole = os.fstat(descriptor).st_size

    def _roll(self) -> None:
        """NAME.1 is the newest of the old ones. What fails leaves the lines in the file that is open."""
        try:
            for number in range(self.backupCount, 0, -1):
                older = f"{self.baseFilename}.{number - 1}" if number > 1 else self.baseFilename
                with contextlib.suppress(FileNotFoundError):
                    os.replace(older, f"{self.baseFilename}.{number}")
            if not self.backupCount:
                os.remove(self.baseFilename)
        except OSError as error:
            self._say(error.strerror or str(error))
            self._size = 0  # try again after as much more
            return
        self._open()

    def _say(self, trouble: str) -> None:
        """Once for all files: on the console, or in the journal of the unit."""
        before = troubles()
        self.trouble = trouble
        if bool(before) != bool(after := troubles()):
            with contextlib.suppress(OSError):
                print(f"sgnode: {after or 'the log files can be written again'}", file=sys.stderr, flush=True)


def troubles() -> str:
    """Why log files can't be written now; empty when all can."""
    failing = {file.trouble: file.baseFilename for file in LogFile.all if file.trouble}
    for why, name in failing.items():
        return f"log files can't be written: {why}: {Path(name).parent}{ADVICE}"
    return ""


def look() -> str:
    """The same, after another try: a process that says nothing would never find out."""
    for file in list(LogFile.all):
        if file.trouble:
            file.retry()
    return troubles()


def install(supervisord_log: Any) -> None:
    """From here on every log file of this supervisord is a LogFile, its own included."""
    for old in list(supervisord_log.handlers):
        if isinstance(old, loggers.RotatingFileHandler):
            new = LogFile(old.baseFilename, "ab", old.maxBytes, old.backupCount)
            new.setFormat(old.fmt)
            new.setLevel(old.level)
            old.close()
            supervisord_log.handlers[supervisord_log.handlers.index(old)] = new
    loggers.RotatingFileHandler = LogFile
