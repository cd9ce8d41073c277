"""How far SGLang's diffusion is: its scheduler says each denoising step on a socket for it (0.5.23, progress_reporter.py).

Of the rest, text encoding and decoding, and of all in 0.5.16, it says nothing: there its processes' CPU time shows that it works.
"""

import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import zmq

from shared.sockets import LoopSocket

LOOK_SECONDS = 1.0
"""Between two looks at CPU time, which /proc has in ticks of 10 ms."""
BUSY = 0.2
"""CPU seconds a second. Who waits for a GPU spins or launches kernels; polling threads of one that sleeps take far less."""
TICKS = os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")


class Progress:
    """Counts what goes on, from any thread: steps or CPU time of the scheduler, encoded frames, requests that begin and end."""

    def __init__(self) -> None:
        self.steps = 0
        self.at = time.monotonic()
        """When it grew last."""
        self._look: tuple[float, float] | None = None
        """The last one: when, and the CPU seconds of all processes."""
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: LoopSocket | None = None

    def step(self, *_: Any) -> None:
        self.steps += 1
        self.at = time.monotonic()

    def look(self, pids: Iterable[int]) -> None:
        """While a generation runs: a step, if these processes together were ``BUSY`` since the last look. No pids: none runs."""
        now, pids = time.monotonic(), list(pids)
        if not pids:
            self._look = None
            return
        if self._look is None:
            self._look = now, sum(map(cpu_seconds, pids))
            return
        wall = now - self._look[0]
        if wall < LOOK_SECONDS:
            return
        used = sum(map(cpu_seconds, pids))
        if used - self._look[1] >= BUSY * wall:
            self.step()
        self._look = now, used

    def listen(self, server_args: Any) -> None:
        """In the running loop. Without such a socket only CPU time shows what a generation does, and the log says so."""
        endpoint = getattr(server_args, "progress_endpoint", None)
        if not endpoint:
            logging.warning("this SGLang tells no progress: its processes' CPU time counts")
            return
        self._context = zmq.Context(io_threads=1)
        socket = self._context.socket(zmq.PULL)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            logging.warning("%s: %s: no progress is known, SGLang's processes' CPU time counts", endpoint, error)
            return
        self._socket = LoopSocket(socket, self.step)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._context is not None:
            self._context.term()


def cpu_seconds(pid: int) -> float:
    """Of all threads, in user and system (proc(5), stat, fields 14 and 15); 0 when there is no such process."""
    try:
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS
