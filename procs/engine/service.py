"""The engine's request service: peers on the ROUTER, their streams, one Step frame a step and peer, credit.

A peer may have ``WINDOW`` Step frames on their way. Past that its new tokens wait and are merged per stream, so a slow
peer gets fewer, larger chunks, nothing is lost, and the socket's high-water mark is never reached. A peer that takes
nothing for ``STALL_SECONDS`` is cut off alone.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import zmq

from procs.engine.backend import Backend
from shared import blobs
from shared.blobs import Blob
from shared.errors import Code, RequestError
from shared.frames import (
    PROTOCOL,
    RID_LENGTH,
    Abort,
    Control,
    ControlDone,
    Credit,
    Failed,
    FromEngine,
    Hello,
    KvUse,
    Output,
    Refused,
    Serving,
    Step,
    Submit,
    ToEngine,
    Welcome,
)
from shared.heart import Heart
from shared.merge import merge
from shared.sockets import REQUEST_MAX_BYTES, UNENCODABLE, Decoder, LoopSocket, encode
from shared.state import UP, State

WINDOW = 64
"""Step frames on their way to a peer: 64 steps of a fast engine (1 ms) hide a 64 ms pause of the peer."""
STALL_SECONDS = 30.0
"""A peer that takes no frame for so long, while some wait, has its requests aborted."""

WATCH_SECONDS = 0.5
"""How often stalled peers are looked for, and how exactly the loop's lag is known."""


@dataclass
class Peer:
    """One life of an agent or prober on the request socket."""

    identity: bytes
    name: str
    life: str
    sent: int = 0
    taken: int = 0
    waiting: dict[str, Output] = field(default_factory=dict)
    rids: set[str] = field(default_factory=set)
    flushing: bool = False
    has_blobs: bool = False
    """Something of it had: the steps of one that has tokens only needn't be searched for them."""
    blocked_since: float | None = None


@dataclass
class Stream:
    """One running request: who asked for it and how many tokens it was given."""

    peer: Peer
    sent: int = 0
    context: str = ""
    """The frontend's id of the request."""


class Service:
    """Owns the ROUTER. All methods run on the event loop."""

    def __init__(self, backend: Backend, sock: zmq.Socket[bytes], heart: Heart, *, incarnation: int, epoch: int) -> None:
        self._backend = backend
        self._raw = sock
        self._heart = heart
        self._incarnation = incarnation
        self._epoch = epoch
        self._socket: LoopSocket | None = None
        self._decoder: Decoder[Any] = Decoder(ToEngine, "the request socket")
        self._peers: dict[bytes, Peer] = {}
        self._streams: dict[str, Stream] = {}
        self._controls: set[asyncio.Task[None]] = set()
        self._steps = 0
        self._tokens = 0
        self._outputs = 0
        self._turned = time.monotonic()
        """When the event loop was last known to turn."""
        self._loop = asyncio.get_running_loop()
        self._watch: asyncio.TimerHandle | None = None
        self._serving = Serving(incarnation)

    def start(self) -> None:
        self._socket = LoopSocket(self._raw, self._receive)
        self._heart.numbers = self.numbers
        self._heart.repeat = lambda: [self._serving]
        self._watch_stalls()

    def numbers(self) -> dict[str, float]:
        """Counters for Beat, said from a thread beside the loop: it may be just this loop that doesn't turn."""
        return {
            **self._backend.numbers(),
            "inflight": len(self._streams),
            "steps": self._steps,
            "tokens": self._tokens,
            "outputs": self._outputs,
            "controls": len(self._controls),
            "loop_lag": max(0.0, time.monotonic() - self._turned - WATCH_SECONDS),
            "dropped_frames": self._decoder.dropped,
            "peers": len(self._peers),
            "load_seconds": self._backend.facts.load_seconds,
        }

    def close(self) -> None:
        """End what still runs with the migratable error, then close the socket."""
        for rid in list(self._streams):
            self.failed(rid, Code.ENGINE_DEAD, "the engine is stopping")
        if self._watch is not None:
            self._watch.cancel()
        for task in self._controls:
            task.cancel()
        if self._socket is not None:
            # The last Failed frames must leave; linger bounds how long that may take.
            self._socket.close(linger=200)

    # --- what arrives ------------------------------------------------------------------------------------------------

    def _receive(self, parts: list[bytes]) -> None:
        if len(parts) < 2:
            self._decoder.drop(f"{len(parts)} parts instead of 2")
            return
        identity, data, *extra = parts
        frame = self._decoder.decode(data)
        if frame is None:
            return
        if len(extra) != (frame.blobs if isinstance(frame, Submit) else 0):
            self._decoder.drop(words := f"{len(extra)} parts too many or too few behind a {type(frame).__name__}")
            if isinstance(frame, Submit):
                self._send(identity, Failed(frame.rid[:RID_LENGTH], Code.INTERNAL, words))
            return
        if extra:
            frame.payload[blobs.BLOBS] = extra
        if isinstance(frame, Hello):
            self._hello(identity, frame)
            return
        peer = self._peers.get(identity)
        if peer is None:
            self._send(identity, Refused("say Hello first"))
            return
        match frame:
            case Submit():
                self._submit(peer, frame)
            case Abort():
                if frame.rid in peer.rids:
                    self._backend.abort(frame.rid)
            case Credit():
                # Credit for frames that were never sent is nonsense; less than before is merely late.
                peer.taken = max(peer.taken, min(frame.steps, peer.sent))
                peer.blocked_since = None
                self._flush(peer)
            case Control():
                task = self._loop.create_task(self._control(peer, frame))
                self._controls.add(task)
                task.add_done_callback(self._controls.discard)

    def _hello(self, identity: bytes, hello: Hello) -> None:
        if hello.protocol not in (PROTOCOL, PROTOCOL - 1):
            reason = f"{hello.name} speaks protocol {hello.protocol}, this engine {PROTOCOL}: upgrade the older of the two"
            logging.error("refused: %s", reason)
            self._send(identity, Refused(reason))
            return
        for peer in list(self._peers.values()):
            if peer.name == hello.name or peer.identity == identity:
                self._forget(peer, f"replaced by a new life of {hello.name}")
        self._peers[identity] = Peer(identity, hello.name, hello.life)
        self._send(identity, Welcome(PROTOCOL, self._incarnation, self._epoch, WINDOW, self._backend.facts))

    def _submit(self, peer: Peer, submit: Submit) -> None:
        rid = submit.rid
        if len(rid) != RID_LENGTH or not rid.isalnum():
            self._send(peer.identity, Failed(rid[:RID_LENGTH], Code.INVALID, f"request id must be {RID_LENGTH} hex characters"))
        elif rid in self._streams:
            self._send(peer.identity, Failed(rid, Code.INVALID, "request id is in use"))
        elif submit.incarnation != self._incarnation:
            self._send(peer.identity, Failed(rid, Code.STALE, f"meant for incarnation {submit.incarnation}"))
        else:
            self._streams[rid] = Stream(peer, context=submit.context)
            ids = {"rid": rid, "request_id": submit.context}
            logging.debug("New SGLang Request ID: %s, Context: %s", rid, submit.context, extra=ids)
            peer.rids.add(rid)
            self._backend.submit(rid, submit.payload)

    async def _control(self, peer: Peer, control: Control) -> None:
        try:
            done = ControlDone(control.id, None, await self._backend.control(control.op, control.args))
        except RequestError as error:
            done = ControlDone(control.id, error.message, code=error.code)
        except Exception as error:  # an engine control may fail in any way; the peer gets the reason
            logging.warning("control %s: %s: %s", control.op, type(error).__name__, error)
            done = ControlDone(control.id, f"{type(error).__name__}: {error}", code=Code.INTERNAL)
        try:
            self._send(peer.identity, done)
        except UNENCODABLE as error:
            self._send(peer.identity, ControlDone(control.id, f"{type(error).__name__}: {error}", code=Code.INTERNAL))

    # --- what leaves (Sink) ------------------------------------------------------------------------------------------

    def output(
        self,
        rid: str,
        token_ids: list[int],
        finish: dict[str, Any] | None,
        meta: dict[str, Any] | None,
        text: str | None = None,
    ) -> None:
        if token_ids or (finish is not None and finish.get("type") != "abort"):
            self._outputs += 1
        stream = self._streams.get(rid)
        if stream is None:
            return
        peer = stream.peer
        output = Output(rid, stream.sent, token_ids, finish, meta, text)
        stream.sent += len(token_ids)
        self._tokens += len(token_ids)
        if finish is not None:
            del self._streams[rid]
            peer.rids.discard(rid)
            if finish.get("type") == "abort":
                ids = {"rid": rid, "request_id": stream.context}
                logging.info("Aborted Request ID: %s, Context: %s, after %d tokens", rid, stream.context, stream.sent, extra=ids)
        if meta is not None and blobs.BLOBS in meta:
            peer.has_blobs = True
        older = peer.waiting.get(rid)
        peer.waiting[rid] = output if older is None else merge(older, output)
        if not peer.flushing:
            # The rest of this engine step is delivered in this turn of the loop: send them together after it.
            peer.flushing = True
            self._loop.call_soon(self._flush, peer)

    def step(self, rows: Iterable[tuple[str, list[int]]]) -> None:
        streams = self._streams
        outputs = tokens = 0
        for rid, token_ids in rows:
            outputs += 1 if token_ids else 0
            stream = streams.get(rid)
            if stream is None:
                continue
            peer = stream.peer
            output = Output(rid, stream.sent, token_ids)
            count = len(token_ids)
            stream.sent += count
            tokens += count
            older = peer.waiting.get(rid)
            peer.waiting[rid] = output if older is None else merge(older, output)
            if not peer.flushing:
                peer.flushing = True
                self._loop.call_soon(self._flush, peer)
        self._outputs += outputs
        self._tokens += tokens

    def failed(self, rid: str, code: Code, message: str) -> None:
        stream = self._streams.pop(rid, None)
        if stream is None:
            return
        peer = stream.peer
        peer.rids.discard(rid)
        waiting = peer.waiting.pop(rid, None)
        if waiting is not None:
            self._send_step(peer, [waiting])
        self._send(peer.identity, Failed(rid, code, message))

    def kv_use(self, use: KvUse) -> None:
        self._heart.publish(use)

    def serving(self, serving: Serving) -> None:
        self._serving = serving
        beat = self._heart.beat
        if beat.state in UP:
            state = State.SLEEPING if serving.asleep else State.PAUSED if serving.paused else State.READY
            way_back = {State.SLEEPING: "`sgnode wake`", State.PAUSED: "POST /engine/continue_generation"}
            self._heart.set(state, beat.detail, waiting_for=way_back.get(state, ""))
        self._heart.publish(serving)

    def _flush(self, peer: Peer) -> None:
        peer.flushing = False
        if not peer.waiting:
            return
        if peer.sent - peer.taken >= WINDOW:
            if peer.blocked_since is None:
                peer.blocked_since = time.monotonic()
            return
        outputs = list(peer.waiting.values())
        peer.waiting.clear()
        self._steps += 1
        self._send_step(peer, outputs)

    def _send_step(self, peer: Peer, outputs: list[Output]) -> None:
        """What no frame can carry together goes one by one; an output that none can carry ends its own request."""
        parts = blobs.detach(outputs) if peer.has_blobs else []
        try:
            self._send(peer.identity, Step(self._incarnation, peer.sent + 1, outputs), parts)
            peer.sent += 1
        except UNENCODABLE as error:
            blobs.attach(outputs, parts)
            if len(outputs) > 1:
                for output in outputs:
                    self._send_step(peer, [output])
            else:
                self._unencodable(peer, outputs[0].rid, error)

    def _unencodable(self, peer: Peer, rid: str, error: Exception) -> None:
        logging.error("request %s: %s: %s", rid, type(error).__name__, error)
        if self._streams.pop(rid, None) is not None:
            peer.rids.discard(rid)
            self._backend.abort(rid)
        self._send(peer.identity, Failed(rid, Code.INTERNAL, f"the answer can't be passed on: {error}"))

    def _send(self, identity: bytes, frame: FromEngine, parts: Sequence[Blob] = ()) -> None:
        if self._socket is None:
            return
        data = encode(frame)
        _check_sizes([data, *parts])
        try:
            if parts:
                self._socket.send_large([identity, data, *parts])
            else:
                self._socket.send([identity, data])
        except zmq.ZMQError as error:
            # EHOSTUNREACH: the peer is gone. EAGAIN can't happen within the window, so it counts as gone as well.
            peer = self._peers.get(identity)
            if peer is not None:
                self._forget(peer, str(error))

    # --- peers that go -----------------------------------------------------------------------------------------------

    def _forget(self, peer: Peer, why: str) -> None:
        """Drop a peer and abort what it left running."""
        self._peers.pop(peer.identity, None)
        rids, peer.rids = peer.rids, set()
        peer.waiting.clear()
        for rid in rids:
            self._streams.pop(rid, None)
            self._backend.abort(rid)
        logging.info("peer %s is gone (%s), %d of its requests aborted", peer.name, why, len(rids))

    def _watch_stalls(self) -> None:
        self._turned = now = time.monotonic()
        for peer in list(self._peers.values()):
            if peer.blocked_since is not None and now - peer.blocked_since > STALL_SECONDS:
                logging.error("peer %s takes no tokens for %d s: cut off", peer.name, STALL_SECONDS)
                for rid in list(peer.rids):
                    self._backend.abort(rid)
                    self._streams.pop(rid, None)
                    self._send(peer.identity, Failed(rid, Code.STALLED, f"no token was taken for {STALL_SECONDS:.0f} s"))
                peer.rids.clear()
                peer.waiting.clear()
                peer.blocked_since = None
        self._watch = self._loop.call_later(WATCH_SECONDS, self._watch_stalls)


def _check_sizes(parts: Sequence[Blob]) -> None:
    """Raises ValueError for a part that would cost its peer the connection."""
    largest = max(map(len, parts))
    if largest > REQUEST_MAX_BYTES:
        raise ValueError(f"{largest} bytes, {REQUEST_MAX_BYTES} at most")
