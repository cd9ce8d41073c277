"""How far SGLang's diffusion is: its scheduler says each denoising step on a socket for it (0.5.23, progress_reporter.py)."""

import logging
import time
from typing import Any

import zmq

from shared.sockets import LoopSocket


class Progress:
    """Counts what goes on, from any thread: steps of the scheduler, frames that are encoded, requests that begin and end."""

    def __init__(self) -> None:
        self.steps = 0
        self.at = time.monotonic()
        """When it grew last."""
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: LoopSocket | None = None

    def step(self, *_: Any) -> None:
        self.steps += 1
        self.at = time.monotonic()

    def listen(self, server_args: Any) -> None:
        """In the running loop. Without such a socket a whole generation counts as one step, and the log says so."""
        endpoint = getattr(server_args, "progress_endpoint", None)
        if not endpoint:
            logging.warning("this SGLang tells no progress: DYN_HEALTH_CHECK_BUSY_STALL has to be longer than any generation")
            return
        self._context = zmq.Context(io_threads=1)
        socket = self._context.socket(zmq.PULL)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            logging.warning("%s: %s: no progress is known, and a generation counts as one step", endpoint, error)
            return
        self._socket = LoopSocket(socket, self.step)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._context is not None:
            self._context.term()
