"""ZMQ sockets: their paths in the runtime directory, their limits, and raw sockets on an asyncio loop.

The token path uses raw sockets on the loop's reader: zmq.asyncio costs 35-40 % of the throughput (docs/architecture.md).
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import zmq

from shared.blobs import Blob
from shared.errors import NodeError

IPC_PATH_LIMIT = 107
"""sun_path on Linux, less its terminating zero: a longer ipc path fails in bind()."""

REQUEST_HWM = 100_000
"""Frames on the request path. Credit keeps far fewer on their way, so reaching it means a defect, not load."""
STATE_HWM = 1_000
"""Beats are repeated; a subscriber that is 1,000 behind needs the newest, not the oldest."""
REQUEST_MAX_BYTES = 64 << 20
"""One part of a message at most: a 1 M token prompt is about 5 MB in msgpack; the rest is room for media."""
STATE_MAX_BYTES = 1 << 20
"""A state frame is a few hundred bytes."""

REQUESTS = "requests"
METRICS = "metrics"

RECEIVE_BATCH = 64
"""Frames taken in one turn of the loop before other callbacks get theirs."""


def socket_path(runtime_dir: Path, name: str) -> Path:
    """Path of a socket; ``name`` is a process ("agent:0") for its state PUB, or REQUESTS / METRICS."""
    return runtime_dir / "sock" / name.replace(":", "-")


def address(runtime_dir: Path, name: str) -> str:
    """ZMQ address of a socket. Raises NodeError when the path is too long for a unix socket."""
    path = str(socket_path(runtime_dir, name))
    if len(path.encode()) > IPC_PATH_LIMIT:
        raise NodeError(f"--runtime-dir: socket path is {len(path.encode())} bytes, {IPC_PATH_LIMIT} at most: {path}")
    return f"ipc://{path}"


def _options(sock: zmq.Socket[bytes], hwm: int, max_bytes: int) -> None:
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.SNDHWM, hwm)
    sock.setsockopt(zmq.RCVHWM, hwm)
    sock.setsockopt(zmq.MAXMSGSIZE, max_bytes)


def publisher(context: zmq.Context[zmq.Socket[bytes]], runtime_dir: Path, process: str) -> zmq.Socket[bytes]:
    """The state PUB of a process, bound."""
    sock = context.socket(zmq.PUB)
    _options(sock, STATE_HWM, STATE_MAX_BYTES)
    sock.bind(address(runtime_dir, process))
    return sock


def subscriber(context: zmq.Context[zmq.Socket[bytes]], runtime_dir: Path, processes: list[str]) -> zmq.Socket[bytes]:
    """A SUB on the state of several processes. They need not exist yet."""
    sock = context.socket(zmq.SUB)
    _options(sock, STATE_HWM, STATE_MAX_BYTES)
    sock.setsockopt(zmq.RECONNECT_IVL, 20)
    sock.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
    sock.setsockopt(zmq.SUBSCRIBE, b"")
    for process in processes:
        sock.connect(address(runtime_dir, process))
    return sock


def router(context: zmq.Context[zmq.Socket[bytes]], runtime_dir: Path, name: str) -> zmq.Socket[bytes]:
    """A ROUTER, bound. MANDATORY: a peer that is gone or full raises instead of dropping frames silently."""
    sock = context.socket(zmq.ROUTER)
    _options(sock, REQUEST_HWM, REQUEST_MAX_BYTES)
    sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
    sock.bind(address(runtime_dir, name))
    return sock


def dealer(context: zmq.Context[zmq.Socket[bytes]], runtime_dir: Path, name: str) -> zmq.Socket[bytes]:
    """A DEALER with a fresh random identity, connected. IMMEDIATE: nothing is queued for a peer that isn't there."""
    sock = context.socket(zmq.DEALER)
    _options(sock, REQUEST_HWM, REQUEST_MAX_BYTES)
    sock.setsockopt(zmq.IMMEDIATE, 1)
    sock.setsockopt(zmq.RECONNECT_IVL, 20)
    sock.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
    sock.connect(address(runtime_dir, name))
    return sock


class LoopSocket:
    """A raw ZMQ socket on the loop's reader: ``on_message`` is called with each multipart message.

    The socket's file descriptor is edge-triggered, so the pending events are looked at again after every send.
    """

    def __init__(self, sock: zmq.Socket[bytes], on_message: Callable[[list[bytes]], None] | None) -> None:
        self.sock = sock
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._fd = int(sock.getsockopt(zmq.FD))
        self._scheduled = False
        self._closed = False
        self._loop.add_reader(self._fd, self._drain)
        self._schedule()

    def send(self, parts: Sequence[Blob]) -> None:
        """Send without blocking. Raises zmq.Again when the peer is full, zmq.ZMQError when it is gone (ROUTER)."""
        self.sock.send_multipart(parts, zmq.NOBLOCK)
        self._schedule()

    def send_large(self, parts: Sequence[Blob]) -> None:
        """As ``send``; parts of 64 KiB and more are not copied, and must not change afterwards."""
        self.sock.send_multipart(parts, zmq.NOBLOCK, copy=False)
        self._schedule()

    def close(self, linger: int = 0) -> None:
        """Close the socket; ``linger``: milliseconds that frames already sent may still take to leave."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            self.sock.close(linger=linger)

    def _schedule(self) -> None:
        if not self._scheduled and not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._scheduled = False
        self._drain()

    def _drain(self) -> None:
        if self._closed:
            return
        for _ in range(RECEIVE_BATCH):
            if not int(self.sock.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return
            try:
                parts = self.sock.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if self._on_message is not None:
                self._on_message(parts)
            if self._closed:
                return
        self._schedule()


T = TypeVar("T")


class Decoder(Generic[T]):
    """Decodes one socket's union. What does not decode is counted, logged once a minute and dropped."""

    LOG_EVERY_SECONDS = 60.0

    def __init__(self, union: type[T] | object, source: str) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)
        self._source = source
        self._logged = -self.LOG_EVERY_SECONDS
        self.dropped = 0

    def decode(self, data: bytes) -> T | None:
        """The frame, or None when it is not one. Never raises."""
        try:
            return self._decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self.drop(str(error))
            return None

    def drop(self, why: str) -> None:
        """Count a frame that can't be used."""
        self.dropped += 1
        now = time.monotonic()
        if now - self._logged >= self.LOG_EVERY_SECONDS:
            self._logged = now
            logging.warning("dropped %d malformed frames on %s so far: %s", self.dropped, self._source, why)


encode = msgspec.msgpack.Encoder().encode
UNENCODABLE = (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError)
"""What ``encode`` raises for what no frame can carry: integers past 64 bits, half a surrogate, objects, too deep a nest."""
