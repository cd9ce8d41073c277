"""Output of programs is read at its pace by supervisor's own poller and dispatchers, and nothing else waits for it."""

import os
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from supervisor.dispatchers import POutputDispatcher
from supervisor.poller import PollPoller

from procs.plugin import pace
from procs.plugin.pace import Pace

LONG = 30.0


class Pipes:
    """A supervisord with one program's output and one other descriptor."""

    def __init__(self) -> None:
        self.output, self.program = os.pipe()
        self.other, self.caller = os.pipe()
        self.poller = PollPoller(SimpleNamespace(logger=None))
        dispatcher = POutputDispatcher.__new__(POutputDispatcher)
        options = SimpleNamespace(poller=self.poller)
        self.pace = Pace(SimpleNamespace(options=options, get_process_map=lambda: {self.output: dispatcher}))
        for fd in (self.output, self.other):
            self.poller.register_readable(fd)

    def wait(self) -> tuple[list[int], float]:
        """What can be read, and after how many seconds."""
        began = time.monotonic()
        readable, _ = self.poller.poll(LONG)
        return sorted(readable), time.monotonic() - began


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    made = Pipes()
    yield made
    for fd in (made.output, made.program, made.other, made.caller):
        os.close(fd)


def test_the_first_line_is_read_at_once_and_the_next_ones_together(pipes: Pipes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "PACE_SECONDS", 0.5)
    os.write(pipes.program, b"one\n")
    readable, seconds = pipes.wait()
    assert readable == [pipes.output] and seconds < 0.4
    os.read(pipes.output, 100)
    for line in (b"two\n", b"three\n"):
        os.write(pipes.program, line)
    readable, seconds = pipes.wait()
    assert readable == [pipes.output] and seconds > 0.2
    assert os.read(pipes.output, 100) == b"two\nthree\n"


def test_anything_else_ends_the_wait(pipes: Pipes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "PACE_SECONDS", LONG)
    os.write(pipes.program, b"one\n")
    pipes.wait()
    later = threading.Timer(0.2, os.write, (pipes.caller, b"!"))
    later.start()
    readable, seconds = pipes.wait()
    later.join()
    assert readable == sorted([pipes.output, pipes.other])
    assert 0.1 < seconds < LONG / 2


def test_other_descriptors_have_no_pace(pipes: Pipes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "PACE_SECONDS", LONG)
    os.write(pipes.program, b"one\n")
    os.write(pipes.caller, b"!")
    for _ in range(3):
        readable, seconds = pipes.wait()
        assert pipes.other in readable and seconds < LONG / 2


def test_a_descriptor_that_was_closed_is_forgotten(pipes: Pipes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "PACE_SECONDS", 0.2)
    spare = os.dup(pipes.other)
    pipes.poller.register_readable(spare)
    os.close(spare)
    os.write(pipes.program, b"one\n")
    found: list[Any] = [pipes.wait()[0] for _ in range(3)]
    assert found == [[pipes.output]] * 3 and spare not in pipes.poller.readables
