"""Programs' output is read at most every ``PACE_SECONDS``, unless supervisord has something else to do.

supervisor 4.3 wakes up for each line, and on a busy host that puts its writer off its core: an agent lost 0.3 ms a request to
a line about it. Nothing is lost meanwhile: lines wait in the pipe, also those of a program that is killed.
"""

import select
import time
from typing import Any

from supervisor.dispatchers import POutputDispatcher

PACE_SECONDS = 0.02
"""A pipe holds 64 KiB: a program that writes less than 3 MB/s never waits."""


class Pace:
    """Takes the place of the ``poll`` of supervisord's poller."""

    def __init__(self, supervisord: Any) -> None:
        self._processes = supervisord.get_process_map
        self._poller = supervisord.options.poller
        self._poll = self._poller.poll
        self._next = 0.0
        self._poller.poll = self.poll

    def poll(self, timeout: float) -> tuple[list[int], list[int]]:
        """Descriptors that can be read and written."""
        readable, writable = self._poll(timeout)
        output = {fd for fd, dispatcher in self._processes().items() if isinstance(dispatcher, POutputDispatcher)}
        if not output.isdisjoint(readable):
            if not writable and output.issuperset(readable) and self._next > (now := time.monotonic()):
                self._others(output, self._next - now)
                readable, writable = self._poll(0)
            self._next = time.monotonic() + PACE_SECONDS
        return readable, writable

    def _others(self, output: set[int], seconds: float) -> None:
        """Wait for anything but output."""
        others = select.poll()
        for fd in self._poller.readables - output:
            others.register(fd, select.POLLIN)
        for fd in self._poller.writables:
            others.register(fd, select.POLLOUT)
        others.poll(seconds * 1e3)
