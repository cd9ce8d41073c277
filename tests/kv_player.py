"""Plays SGLang's KV event sockets: a PUB, and a replay ROUTER in a thread (sglang 0.5.23, ZmqEventPublisher)."""

import threading
import time
from typing import Any

import msgspec
import zmq

BLOCK = 4
"""Tokens of a block."""


def stored(hashes: list[int], parent: int | None = None, **more: Any) -> dict[str, Any]:
    """Block h holds the tokens 10 h, 10 h + 1, …"""
    tokens = [10 * each + index for each in hashes for index in range(BLOCK)]
    event = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": tokens}
    return {**event, "block_size": BLOCK, "lora_id": None, "medium": "GPU", **more}


def removed(*hashes: int, **more: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU", **more}


CLEARED = {"type": "AllBlocksCleared"}


class Player:
    """``events`` and ``replay`` are its addresses. ``cut``: answers to a replay end after so many frames, without a word."""

    def __init__(self, *, address: str = "tcp://127.0.0.1:*", buffer: int = 10_000) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._pub.bind(address)
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind("tcp://127.0.0.1:*")
        self.events = self._pub.getsockopt_string(zmq.LAST_ENDPOINT)
        self.replay = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._buffer: list[tuple[int, bytes]] = []
        self._size = buffer
        self._number = 0
        self.cut: int | None = None
        self.asked: list[int] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def say(self, *events: Any, heard: bool = True) -> None:
        """One frame with these events; ``heard=False``: it gets lost on its way."""
        payload = msgspec.msgpack.encode([time.time(), list(events), 0])
        if heard:
            self._pub.send_multipart([b"kv-events", self._number.to_bytes(8, "big"), payload])
        self._buffer = [*self._buffer, (self._number, payload)][-self._size :]
        self._number += 1

    def forget(self) -> None:
        """Its buffer has none of what was said so far."""
        self._buffer = []

    def raw(self, *parts: bytes) -> None:
        self._pub.send_multipart(list(parts))

    def _answer(self) -> None:
        while not self._closed.is_set():
            if not self._router.poll(20):
                continue
            client, empty, number = self._router.recv_multipart()
            self.asked.append(start := int.from_bytes(number, "big"))
            wanted = [(each, payload) for each, payload in self._buffer if each >= start]
            for each, payload in wanted[: self.cut]:
                self._router.send_multipart([client, empty, b"kv-events", each.to_bytes(8, "big"), payload])
            if self.cut is None or len(wanted) <= self.cut:
                self._router.send_multipart([client, empty, b"", b"\xff" * 8, b""])

    def close(self) -> None:
        self._closed.set()
        self._thread.join(5)
        self._context.destroy(linger=0)

    def __enter__(self) -> "Player":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
