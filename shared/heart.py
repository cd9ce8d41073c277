"""A process's own state and its Beat frames: twice a second, and at once when the state changes."""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from shared import log_levels, logs
from shared.frames import Beat, Frame
from shared.sockets import encode, publisher
from shared.state import BEAT_SECONDS, State


class Heart:
    """Owns the state PUB of a process. One thread changes the state; in ``beating_from_a_thread`` another one says it as well."""

    def __init__(self, runtime_dir: Path, process: str, *, incarnation: int = 0, epoch: int = 0) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._sock = publisher(self._context, runtime_dir, process)
        self._beat = Beat(process, os.getpid(), State.STARTING, "", time.time(), "", incarnation, epoch)
        self._task: asyncio.Task[None] | None = None
        self._lock = threading.Lock()
        self.numbers: Callable[[], dict[str, float]] = dict
        self.marks: dict[str, float] = {}
        self.repeat: Callable[[], list[Frame]] = list
        """Frames to publish beside each Beat (Verdict, Intent): late subscribers must hear them too."""

    @property
    def state(self) -> str:
        return self._beat.state

    @property
    def beat(self) -> Beat:
        return self._beat

    def set(
        self,
        state: State,
        detail: str = "",
        *,
        waiting_for: str = "",
        incarnation: int | None = None,
        epoch: int | None = None,
        info: dict[str, str] | None = None,
    ) -> None:
        """Change the state and say so at once."""
        if incarnation:
            logs.facts["incarnation"] = incarnation
        old = self._beat
        self._beat = msgspec.structs.replace(
            old,
            state=state,
            detail=detail,
            since=old.since if old.state == state else time.time(),
            waiting_for=waiting_for,
            incarnation=old.incarnation if incarnation is None else incarnation,
            epoch=old.epoch if epoch is None else epoch,
            info=old.info if info is None else info,
        )
        if (old.state, old.detail, old.waiting_for, old.incarnation, old.info) != (
            state,
            detail,
            waiting_for,
            self._beat.incarnation,
            self._beat.info,
        ):
            self.say()

    def publish(self, frame: Frame) -> None:
        """Publish any frame of this socket's union."""
        with self._lock:
            self._send(frame)

    def _send(self, frame: Frame) -> None:
        if not self._sock.closed:
            self._sock.send(encode(frame), zmq.NOBLOCK)

    def say(self) -> None:
        """Publish the current Beat and what is repeated with it."""
        log_levels.follow()
        with self._lock:  # or an older state could be said after a newer one
            self._send(msgspec.structs.replace(self._beat, numbers=self.numbers(), marks=dict(self.marks)))
            for frame in self.repeat():
                self._send(frame)

    def start(self) -> None:
        """Beat from the running loop until close()."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while True:
            self.say()
            await asyncio.sleep(BEAT_SECONDS)

    def beating_from_a_thread(self, look: Callable[[], None] = lambda: None) -> "_ThreadBeat":
        """Context manager: beats go on while the caller blocks (an engine being built). ``look`` is called before each."""
        return _ThreadBeat(self, look)

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        with self._lock:
            self._sock.close(linger=100)
        self._context.term()


class _ThreadBeat:
    def __init__(self, heart: Heart, look: Callable[[], None]) -> None:
        self._heart = heart
        self._look = look
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._look()
            self._heart.say()

    def __enter__(self) -> None:
        self._heart.say()
        self._thread.start()

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()
