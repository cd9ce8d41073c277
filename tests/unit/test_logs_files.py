"""supervisord's log files and the journal: a full disk, rotations, whole lines."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from supervisor import loggers

from procs.plugin import logfile
from procs.plugin.journal import LINE_BYTES, Journal
from procs.plugin.logfile import LogFile
from shared import logs


class Disk:
    """Has room for so many bytes; None: for all. Stands in front of os.write."""

    room: int | None = None

    def write(self, descriptor: int, data: bytes) -> int:
        if self.room is None:
            return WRITE(descriptor, data)
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = WRITE(descriptor, data[: self.room])
        self.room -= taken
        return taken


WRITE = os.write


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk()
    monkeypatch.setattr("procs.plugin.logfile.os.write", made.write)
    monkeypatch.setattr(LogFile, "all", type(LogFile.all)())
    monkeypatch.setattr(logs, "facts", {"process": "supervisord"})
    yield made


def log_file(path: Path, **options: int) -> LogFile:
    made = LogFile(str(path), **options)
    made.setFormat("%(message)s")
    return made


def test_a_full_disk_costs_its_lines_and_says_so_once(disk: Disk, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, other = tmp_path / "engine.log", tmp_path / "agent-0.log"
    log, second = log_file(path), log_file(other)
    log.write(b"before\n")
    disk.room = 4
    log.write(b"cut here\n")
    for _ in range(1000):
        log.write(b"lost\n")
        second.write(b"lost too\n")
    assert "No space left on device" in logfile.look() and str(tmp_path) in logfile.look()
    said = capfd.readouterr().err.splitlines()
    assert said == [f"sgnode: log files can't be written: No space left on device: {tmp_path}{logfile.ADVICE}"]
    disk.room = None
    log.write(b"after\n")
    assert "can't be written" in logfile.troubles()  # the other has said nothing since
    assert logfile.look() == "" and capfd.readouterr().err == "sgnode: the log files can be written again\n"
    lines = path.read_text().splitlines()
    assert (lines[0], lines[2:]) == ("before", ["after"])
    assert lines[1].endswith("WARN supervisord: 5009 bytes are missing here: No space left on device")
    assert "9000 bytes are missing" in other.read_text()


def test_a_line_is_there_or_is_not(disk: Disk, tmp_path: Path) -> None:
    log = log_file(tmp_path / "log")
    log.write(b"whole\nbegins")
    disk.room = 0
    log.write(b" and ends\nnext ")
    disk.room = None
    log.write(b"goes on")
    log.write(b" and ends, too\nnew\n")
    first, note, last = (tmp_path / "log").read_text().splitlines()
    assert (first, last) == ("whole", "new") and f" {len('begins and ends.next goes on and ends, too.')} bytes are" in note


def test_half_a_note_is_taken_back(disk: Disk, tmp_path: Path) -> None:
    log = log_file(tmp_path / "log")
    disk.room = 0
    log.write(b"lost\n")
    for room in (1, 20, 0):
        disk.room = room
        assert not log.retry() and (tmp_path / "log").read_bytes() == b""
    disk.room = None
    log.write(b"x\n")
    assert (tmp_path / "log").read_text().count("missing") == 1


def test_a_rotation_waits_for_the_end_of_a_line_and_keeps_so_many(disk: Disk, tmp_path: Path) -> None:
    log = log_file(tmp_path / "log", maxBytes=10, backupCount=2)
    for part in (b"0123456789", b"tail\n", b"second line\n", b"third line\n", b"fourth\n"):
        log.write(part)
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {"log": b"fourth\n", "log.1": b"third line\n", "log.2": b"second line\n"}


def test_a_rotation_that_fails_keeps_the_file(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_file(tmp_path / "log", maxBytes=10, backupCount=1)

    def refuses(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr("procs.plugin.logfile.os.replace", refuses)
        log.write(b"a line of more\n")
        assert "Read-only" in logfile.troubles()
    log.write(b"and another line\n")
    log.write(b"x\n")
    assert (tmp_path / "log.1").read_bytes() == b"a line of more\nand another line\n"
    assert (tmp_path / "log").read_bytes() == b"x\n"


def test_a_file_that_can_t_be_opened_is_opened_later(disk: Disk, tmp_path: Path) -> None:
    log = log_file(tmp_path / "gone" / "log")
    log.write(b"lost\n")
    assert "No such file" in logfile.troubles() or "could not be opened" in logfile.troubles()
    (tmp_path / "gone").mkdir()
    log.write(b"there\n")
    assert (tmp_path / "gone" / "log").read_text().endswith("there\n") and not logfile.troubles()


def test_supervisord_s_own_log_and_those_to_come_are_such_files(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "RotatingFileHandler", loggers.RotatingFileHandler)
    monkeypatch.setenv("DYN_LOGGING_JSONL", "1")
    own = loggers.getLogger()
    loggers.handle_file(own, str(tmp_path / "own"), "%(asctime)s %(levelname)s %(message)s\n", True, 100_000, 3)
    logfile.install(own)
    own.warn("exited: engine")
    child = loggers.getLogger()
    loggers.handle_file(child, str(tmp_path / "child"), "%(message)s", rotating=True, maxbytes=100, backups=1)
    assert [type(handler) for handler in own.handlers + child.handlers] == [LogFile, LogFile]
    child.info(b"as it is, 50 %\xff\n")
    assert (tmp_path / "child").read_bytes() == b"as it is, 50 %\xff\n"
    text = (tmp_path / "own").read_text()
    assert '"level":"WARN","process":"supervisord","message":"exited: engine"}\n' in text
    for handler in child.handlers:  # `sgnode ctl clear`
        handler.remove()
        handler.reopen()
    assert (tmp_path / "child").read_bytes() == b""


class Heard(Journal):
    """Keeps the datagrams."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        super().__init__("n", {}, path="/nowhere")

    def _put(self, process: str, datagram: bytes) -> None:
        self.sent.append(datagram)

    def priorities(self) -> list[str]:
        return [datagram.decode().split("\n")[0].removeprefix("PRIORITY=") for datagram in self.sent]


def test_the_journal_has_a_json_line_s_level_and_all_of_it() -> None:
    journal = Heard()
    line = (
        b'{"time":"2026-11-24T20:49:29.877130Z","level":"WARN","target":"x","message":"' + b"m" * (logs.LINE_BYTES - 100) + b'"}'
    )
    journal.take("engine", 7, line[:100])
    journal.take("engine", 7, line[100:] + b"\n")
    assert journal.priorities() == ["4"] and journal.sent[0].endswith(b"MESSAGE=" + line + b"\n")


def test_a_longer_line_is_in_the_journal_in_numbered_parts() -> None:
    journal = Heard()
    journal.take("engine", 7, b"ERROR " + b"x" * LINE_BYTES + b"\n")
    assert journal.priorities() == ["3", "3"]
    assert [b"SGNODE_PART=%d/2\n" % n in datagram for n, datagram in ((1, journal.sent[0]), (2, journal.sent[1]))] == [True, True]


def test_a_traceback_has_the_priority_of_its_line() -> None:
    journal = Heard()
    journal.take(
        "relay", 7, b'2026 ERROR relay: no\nTraceback (most recent call last):\n  File "x"\n2026 INFO relay: on\n  more\n'
    )
    assert journal.priorities() == ["3", "3", "3", "6", "6"]


def test_a_handler_that_supervisor_drops_holds_no_descriptor(tmp_path: Path) -> None:
    """supervisor makes one at each start of a process and closes none: its own goes with its file object."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        LogFile(str(tmp_path / "engine.log"))
    assert len(os.listdir("/proc/self/fd")) == before
