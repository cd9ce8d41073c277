"""The peer's end of the request path: follows the engine's lives, submits, and checks that no token is missing.

One DEALER for each incarnation, so nothing that was queued for a dead engine reaches the next one.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import zmq

from shared import blobs, logs, sockets
from shared.blobs import Blob
from shared.errors import Code, RequestError
from shared.frames import (
    PROTOCOL,
    Abort,
    Beat,
    Control,
    ControlDone,
    Credit,
    Death,
    Failed,
    Frame,
    FromEngine,
    Hello,
    Output,
    Refused,
    Step,
    Submit,
    Welcome,
)
from shared.merge import merge
from shared.sockets import REQUEST_MAX_BYTES, UNENCODABLE, Decoder, LoopSocket, encode
from shared.state import BEAT_SECONDS, LOST, UP, Board, State

HELLO_SECONDS = 1.0
"""An unanswered Hello is repeated: the ROUTER may have bound after the Beat that announced it."""
CONNECT_SECONDS = 0.01
"""Until the DEALER is connected it takes nothing (ZMQ_IMMEDIATE), which is a matter of a millisecond."""
CREDIT_PARTS = 4
"""Credit is sent four times a window: often enough that the engine never waits for it, seldom enough to cost nothing."""


class Stream:
    """The outputs of one request, as they come. What waits for a busy reader is merged into one output."""

    def __init__(self, client: "EngineClient", rid: str) -> None:
        self.rid = rid
        self._client = client
        self._waiting: Output | None = None
        self._failure: RequestError | None = None
        self._received = 0
        self.ended = False
        self.on_ready: Callable[[], None] = lambda: None
        """Called when there is something to take where there was nothing."""

    def abort(self) -> None:
        """Ask the engine to end it; its terminal output still comes."""
        if not self.ended:
            self._client.send(Abort(self.rid))

    def put(self, output: Output) -> None:
        if output.offset != self._received:
            self.abort()
            self.fail(RequestError(Code.GAP, f"tokens {self._received} to {output.offset} of the stream are missing"))
            return
        self._received += len(output.token_ids)
        if output.finish is not None:
            self.ended = True
        if self._waiting is None:
            self._waiting = output
            self.on_ready()
        else:
            merge(self._waiting, output)

    def fail(self, error: RequestError) -> None:
        self.ended = True
        self._failure = error
        self._client.forget(self.rid)
        if self._waiting is None:
            self.on_ready()

    @property
    def has_news(self) -> bool:
        """There is something to take."""
        return self._waiting is not None or self._failure is not None

    def take(self) -> Output | None:
        """What has come since the last look, as one output. Raises RequestError after the last of a failed request."""
        output = self._waiting
        if output is None:
            if self._failure is not None:
                raise self._failure
            return None
        self._waiting = None
        return output

    async def __aiter__(self) -> AsyncIterator[Output]:
        """Yield outputs until the terminal one. Raises RequestError when the request fails."""
        async for _, output in interleaved([self]):
            yield output


async def interleaved(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, Output]]:
    """Outputs of several streams as they come, each with its stream's index, until all have ended. Raises RequestError."""
    loop = asyncio.get_running_loop()
    left = dict(enumerate(streams))
    wake = loop.create_future()

    def ready() -> None:
        if not wake.done():
            wake.set_result(None)

    for stream in streams:
        stream.on_ready = ready
    while left:
        idle = True
        for index, stream in list(left.items()):
            output = stream.take()
            if output is not None:
                idle = False
                if output.finish is not None:
                    del left[index]
                yield index, output
        if idle:
            wake = loop.create_future()
            await wake


class EngineClient:
    """One peer of the engine. Feed it every Beat of the engine and every Death; it connects and disconnects by them."""

    def __init__(self, runtime_dir: Path, name: str) -> None:
        self._runtime_dir = runtime_dir
        self._name = name
        self._life = uuid.uuid4().hex
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._socket: LoopSocket | None = None
        self._decoder: Decoder[Any] = Decoder(FromEngine, "the request path")
        self._incarnation = 0
        self._dead = 0
        self._streams: dict[str, Stream] = {}
        self._controls: dict[int, asyncio.Future[Any]] = {}
        self._control_id = 0
        self._taken = 0
        self._acknowledged = 0
        self._hello: asyncio.TimerHandle | None = None
        self._clock = 0.0
        self._looked = time.monotonic()
        self.board = Board(clock=lambda: self._clock)
        """Engine and keeper as heard here. Its clock stands still while this very process is paused."""
        self._watching = asyncio.get_running_loop().call_later(BEAT_SECONDS, self._watch)
        self.welcome: Welcome | None = None
        self.refused: str = ""
        self.on_change: Callable[[], None] = lambda: None
        """Called when the engine is welcomed, refused or lost."""

    # --- the engine's lives ------------------------------------------------------------------------------------------

    def hear_beat(self, beat: Beat) -> None:
        """Any Beat; those of ``engine`` and ``keeper`` are looked at."""
        if beat.process not in ("engine", "keeper"):
            return
        self.board.hear(beat)
        if beat.process == "keeper" or beat.incarnation < self._incarnation:
            return
        if beat.incarnation > self._incarnation:
            self._drop("the engine was started again")
        elif beat.state in (State.STOPPED, State.FAILED):
            self._drop(f"the engine has {beat.state}")
        if beat.state in UP and self._socket is None and beat.incarnation > self._dead:
            self._connect(beat.incarnation)

    def hear_death(self, death: Death) -> None:
        """A Death of the keeper: nothing of this incarnation or an older one comes back."""
        self._dead = max(self._dead, death.incarnation)
        if death.incarnation >= self._incarnation:
            self._drop(death.reason)

    def _drop(self, reason: str, code: Code = Code.ENGINE_DEAD) -> None:
        """Disconnect; every stream and control ends with the code."""
        if self._socket is None:
            return
        logging.warning("engine %d is lost: %s (%d streams)", self._incarnation, reason, len(self._streams))
        self._disconnect()
        for stream in list(self._streams.values()):
            stream.fail(RequestError(code, reason))
        for future in self._controls.values():
            if not future.done():
                future.set_exception(RequestError(code, reason))
        self._controls.clear()
        self.on_change()

    def _watch(self) -> None:
        """An engine and a keeper that are both silent past the deadline are lost, until the engine is heard again."""
        now = time.monotonic()
        # A tick that comes late tells of a pause here, in which the others' beats could not be read.
        self._clock += min(now - self._looked, 2 * BEAT_SECONDS)
        self._looked = now
        if self._socket is not None and self.board.state("engine") == LOST and self.board.beat("keeper") is None:
            self._drop("neither the engine nor its keeper gives a sign of life")
        self._watching = asyncio.get_running_loop().call_later(BEAT_SECONDS, self._watch)

    def _connect(self, incarnation: int) -> None:
        self._incarnation = incarnation
        self._taken = self._acknowledged = 0
        self.refused = ""
        self._socket = LoopSocket(sockets.dealer(self._context, self._runtime_dir, sockets.REQUESTS), self._receive)
        self._say_hello()

    def _say_hello(self) -> None:
        sent = self.send(Hello(PROTOCOL, self._name, self._life))
        again = HELLO_SECONDS if sent else CONNECT_SECONDS
        self._hello = asyncio.get_running_loop().call_later(again, self._repeat_hello)

    def _repeat_hello(self) -> None:
        if self.welcome is None and not self.refused and self._socket is not None:
            self._say_hello()

    def _disconnect(self) -> None:
        if self._hello is not None:
            self._hello.cancel()
        if self._socket is not None:
            self._socket.close()
        self._socket = None
        self.welcome = None

    def close(self) -> None:
        self._watching.cancel()
        self._disconnect()
        self._context.term()

    # --- requests ----------------------------------------------------------------------------------------------------

    @property
    def inflight(self) -> int:
        return len(self._streams)

    @property
    def dropped(self) -> int:
        return self._decoder.dropped

    def submit(self, payload: dict[str, Any], context: str = "") -> Stream:
        """Start a request; ``context``: what its frontend calls it. The payload's ``blobs`` travel beside its frame.

        Raises RequestError: ENGINE_DEAD when no engine is welcomed, INVALID for what no frame can carry.
        """
        if self.welcome is None:
            raise RequestError(Code.ENGINE_DEAD, "no engine is up")
        stream = Stream(self, uuid.uuid4().hex)
        plain, parts = blobs.take(payload)
        assert plain is not None
        if not self.send(Submit(self.welcome.incarnation, stream.rid, plain, context, len(parts)), parts):
            raise RequestError(Code.OVERLOADED, "the engine's socket takes no more requests now")
        self._streams[stream.rid] = stream
        return stream

    async def control(self, op: str, args: dict[str, Any], seconds: float = 60.0) -> Any:
        """Run an engine control. Raises RequestError when there is no engine, it refuses, or the time is up."""
        if self.welcome is None:
            raise RequestError(Code.ENGINE_DEAD, "no engine is up")
        self._control_id += 1
        number = self._control_id
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not self.send(Control(number, op, args)):
            raise RequestError(Code.ENGINE_DEAD, f"{op}: the engine's socket takes no control")
        self._controls[number] = future
        try:
            return await asyncio.wait_for(future, seconds)
        except TimeoutError as error:
            raise RequestError(Code.INTERNAL, f"{op}: no answer within {seconds:.0f} s") from error
        finally:
            self._controls.pop(number, None)

    def send(self, frame: Frame, parts: Sequence[Blob] = ()) -> bool:
        """Send a frame and parts behind it; False when the engine can't take it now.

        Raises RequestError(INVALID) for what no frame can carry.
        """
        if self._socket is None:
            return False
        try:
            data = encode(frame)
        except UNENCODABLE as error:
            raise RequestError(Code.INVALID, f"a value of the request can't be passed on: {error}") from None
        largest = max(len(data), *map(len, parts)) if parts else len(data)
        if largest > REQUEST_MAX_BYTES:
            # It would cost every stream of this process its connection.
            raise RequestError(Code.INVALID, f"a part of the request has {largest} bytes, {REQUEST_MAX_BYTES} at most")
        try:
            if parts:
                self._socket.send_large([data, *parts])
            else:
                self._socket.send([data])
        except zmq.Again:
            return False
        return True

    def forget(self, rid: str) -> None:
        self._streams.pop(rid, None)

    def _receive(self, parts: list[bytes]) -> None:
        frame = self._decoder.decode(parts[0])
        if isinstance(frame, Step):
            if len(parts) > 1:
                try:
                    blobs.attach(frame.outputs, parts[1:])
                except ValueError as error:
                    self._decoder.drop(str(error))
                    return
            self._step(frame)
        elif isinstance(frame, Failed):
            stream = self._streams.get(frame.rid)
            if stream is not None:
                stream.fail(RequestError(_code(frame.code), frame.message))
        elif isinstance(frame, ControlDone):
            future = self._controls.get(frame.id)
            if future is not None and not future.done():
                if frame.error is None:
                    future.set_result(frame.result)
                else:
                    future.set_exception(RequestError(_code(frame.code), frame.error))
        elif isinstance(frame, Welcome):
            if frame.incarnation == self._incarnation and self.welcome is None:
                self.welcome = frame
                logs.facts["incarnation"] = frame.incarnation
                self.on_change()
        elif isinstance(frame, Refused):
            self._refused(frame.reason)

    def _step(self, step: Step) -> None:
        if step.incarnation != self._incarnation or self.welcome is None:
            return
        self._taken = step.seq
        for output in step.outputs:
            stream = self._streams.get(output.rid)
            if stream is None:
                continue
            if output.finish is not None:
                self.forget(output.rid)
            stream.put(output)
        if self._taken - self._acknowledged >= max(1, self.welcome.window // CREDIT_PARTS) and self.send(Credit(self._taken)):
            self._acknowledged = self._taken

    def _refused(self, reason: str) -> None:
        if self.welcome is None:
            self.refused = reason
            logging.error("the engine refuses this process: %s", reason)
            self.on_change()
            return
        # ZMQ reconnected under a new identity: the engine has forgotten us and our streams.
        self._drop(f"the connection broke ({reason})", Code.GAP)
        self._connect(self._incarnation)


def _code(text: str) -> Code:
    """A code of a newer engine reads as INTERNAL."""
    try:
        return Code(text)
    except ValueError:
        return Code.INTERNAL
