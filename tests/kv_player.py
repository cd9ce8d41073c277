"""SGLang's KV event sockets (sglang 0.5.23, ZmqEventPublisher): played, listened to with losses, and asked for everything."""

import random
import threading
import time
from collections import deque
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


END = b"\xff" * 8
CLEARED = {"type": "AllBlocksCleared"}


class Player:
    """A PUB, and a replay ROUTER in a thread. ``events`` and ``replay`` are its addresses.

    ``cut``: answers to a replay end after so many frames, without a word. ``topics``: an answer's frames have the topic in front,
    as with SGLang 0.5.23; not with 0.5.16.
    """

    def __init__(self, *, address: str = "tcp://127.0.0.1:*", buffer: int = 10_000, topics: bool = True) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._pub.setsockopt(zmq.SNDHWM, 100_000)
        self._pub.bind(address)
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind("tcp://127.0.0.1:*")
        self.events = self._pub.getsockopt_string(zmq.LAST_ENDPOINT)
        self.replay = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer)
        self._number = 0
        self.cut: int | None = None
        self.topics = topics
        self.asked: list[int] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def say(self, *events: Any, heard: bool = True) -> None:
        """One frame with these events; ``heard=False``: it gets lost on its way."""
        self.send(msgspec.msgpack.encode([time.time(), list(events), 0]), heard=heard)

    def send(self, payload: bytes, *, heard: bool = True) -> None:
        if heard:
            self._pub.send_multipart([b"kv-events", self._number.to_bytes(8, "big"), payload])
        self._buffer.append((self._number, payload))
        self._number += 1

    def forget(self) -> None:
        """Its buffer has none of what was said so far."""
        self._buffer.clear()

    def raw(self, *parts: bytes) -> None:
        self._pub.send_multipart(list(parts))

    def _answer(self) -> None:
        while not self._closed.is_set():
            if not self._router.poll(20):
                continue
            client, empty, number = self._router.recv_multipart()
            self.asked.append(start := int.from_bytes(number, "big"))
            wanted = [(each, payload) for each, payload in list(self._buffer) if each >= start]
            for each, payload in wanted[: self.cut]:
                topic = [b"kv-events"] if self.topics else []
                self._router.send_multipart([client, empty, *topic, each.to_bytes(8, "big"), payload])
            if self.cut is None or len(wanted) <= self.cut:
                self._router.send_multipart([client, empty, *([b""] if self.topics else []), END, b""])

    def close(self) -> None:
        self._closed.set()
        self._thread.join(5)
        self._context.destroy(linger=0)

    def __enter__(self) -> "Player":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class Dropper:
    """Stands between SGLang's PUB at ``source`` and those who listen at ``address``; drops each frame with the chance ``share``.

    ``seen`` and ``dropped`` frames.
    """

    def __init__(self, source: str, address: str, seed: int = 1) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sub, self._pub = self._context.socket(zmq.SUB), self._context.socket(zmq.PUB)
        self._sub.setsockopt(zmq.RCVHWM, 0)
        self._pub.setsockopt(zmq.SNDHWM, 0)
        self._sub.setsockopt(zmq.SUBSCRIBE, b"")
        self._sub.setsockopt(zmq.RECONNECT_IVL, 20)
        self._sub.connect(source)
        self._pub.bind(address)
        self._chance = random.Random(seed)
        self.share = 0.0
        self.seen = self.dropped = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closed.is_set():
            if not self._sub.poll(50):
                continue
            parts = self._sub.recv_multipart()
            self.seen += 1
            if self._chance.random() < self.share:
                self.dropped += 1
            else:
                self._pub.send_multipart(parts)

    def close(self) -> None:
        self._closed.set()
        self._thread.join(5)
        self._context.destroy(linger=0)


class Fold:
    """What an engine holds by its own word: all its events from the first one on, which its replay socket must still have."""

    def __init__(self, replay: str, block_size: int) -> None:
        self._replay = replay
        self._block_size = block_size
        self._blocks: dict[int, list[int]] = {}
        self.frames = self.events = 0

    def look(self) -> dict[int, int]:
        """As KvRouter.believed has a worker's: SGLang's hash, as 64 bits without a sign, and Dynamo's hash of the tokens."""
        from dynamo.llm import compute_block_hash_for_seq

        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            sock = context.socket(zmq.DEALER)
            sock.setsockopt(zmq.RCVHWM, 0)
            sock.connect(self._replay)
            while self._ask(sock):
                pass
        finally:
            context.destroy(linger=0)
        return {each % 2**64: compute_block_hash_for_seq(tokens, self._block_size)[0] for each, tokens in self._blocks.items()}

    def _ask(self, sock: zmq.Socket[bytes]) -> bool:
        """Ask for what comes next; whether that brought any. SGLang's ROUTER leaves out what the line can't take at once."""
        began = self.frames
        sock.send_multipart([b"", began.to_bytes(8, "big")])
        number = b""
        while number != END and (number == b"" or sock.poll(500)):
            assert sock.poll(10_000), "no answer to a replay"
            _, _, number, payload = sock.recv_multipart()
            if int.from_bytes(number, "big") != self.frames:
                assert number == END or self.frames > began, "buffer_steps is too small for this test"
                continue
            self.frames += 1
            for event in msgspec.msgpack.decode(payload)[1]:
                self._apply(event)
        return self.frames > began

    def _apply(self, event: dict[str, Any]) -> None:
        self.events += 1
        assert event.get("medium", "GPU") == "GPU", event
        if event["type"] == "AllBlocksCleared":
            self._blocks = {}
        elif event["type"] == "BlockRemoved":
            for each in event["block_hashes"]:
                del self._blocks[each]  # KeyError: our understanding of the events is wrong
        else:
            tokens, size = event["token_ids"], self._block_size
            for index, each in enumerate(event["block_hashes"]):
                self._blocks[each] = tokens[index * size : (index + 1) * size]
