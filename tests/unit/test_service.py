"""The engine's request service on a real ROUTER, with a scripted backend: steps, credit, peers that go, bad frames."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from procs.engine import service as module
from procs.engine.service import WINDOW, Service
from shared import sockets
from shared.errors import Code, RequestError
from shared.frames import (
    PROTOCOL,
    Abort,
    Control,
    ControlDone,
    Credit,
    EngineFacts,
    Failed,
    Frame,
    FromEngine,
    Hello,
    Refused,
    Serving,
    Step,
    Submit,
    Welcome,
)
from shared.heart import Heart
from shared.state import State

INCARNATION = 3
DECODER = msgspec.msgpack.Decoder(FromEngine)
FACTS = EngineFacts("aggregated", "scripted", "0", "/m", "m", 100, 4096, 16, 10, 4, 100, 0, 1, 1, [2], 0.1)


class ScriptedBackend:
    """Records what it is asked; the test speaks for it."""

    facts = FACTS
    info: dict[str, str] = {}  # noqa: RUF012 - nothing changes it

    def __init__(self) -> None:
        self.submitted: dict[str, dict[str, Any]] = {}
        self.aborted: list[str] = []

    def start(self, sink: Any, stop: Callable[[], None]) -> None: ...

    async def warm(self) -> None: ...

    def submit(self, rid: str, payload: dict[str, Any]) -> None:
        self.submitted[rid] = payload

    def abort(self, rid: str) -> None:
        self.aborted.append(rid)

    async def control(self, op: str, args: dict[str, Any]) -> Any:
        if op != "echo":
            raise ValueError(f"unknown control {op!r}")
        return args

    def numbers(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


class PeerSocket:
    """A peer's end of the request socket."""

    def __init__(self, context: zmq.asyncio.Context, directory: Path) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(sockets.address(directory, sockets.REQUESTS))

    async def send(self, frame: Frame) -> None:
        await self.socket.send(sockets.encode(frame))

    async def receive(self) -> Any:
        return DECODER.decode(await asyncio.wait_for(self.socket.recv(), 5))

    async def hello(self, name: str = "agent:0", protocol: int = PROTOCOL) -> Any:
        await self.send(Hello(protocol, name, uuid.uuid4().hex))
        return await self.receive()

    async def nothing_comes(self) -> bool:
        return not await self.socket.poll(50)


class Bench:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "sock").mkdir()
        self.context = zmq.asyncio.Context()
        self.backend = ScriptedBackend()
        self.heart = Heart(directory, "engine", incarnation=INCARNATION)
        raw = sockets.router(zmq.Context.shadow(self.context), directory, sockets.REQUESTS)
        self.service = Service(self.backend, raw, self.heart, incarnation=INCARNATION, epoch=0)
        self.service.start()
        self.peers: list[PeerSocket] = []

    def peer(self) -> PeerSocket:
        peer = PeerSocket(self.context, self.directory)
        self.peers.append(peer)
        return peer

    async def submit(self, peer: PeerSocket, incarnation: int = INCARNATION) -> str:
        rid = uuid.uuid4().hex
        await peer.send(Submit(incarnation, rid, {"input_ids": [1]}))
        return rid

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 - the condition is the test's own
                await asyncio.sleep(0.002)


@asynccontextmanager
async def bench_at(directory: Path) -> AsyncIterator[Bench]:
    bench = Bench(directory)
    try:
        yield bench
    finally:
        bench.service.close()
        bench.heart.close()
        for peer in bench.peers:
            peer.socket.close()
        bench.context.term()


def run(directory: Path, test: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        async with bench_at(directory) as bench:
            await test(bench)

    asyncio.run(main())


def test_a_step_of_several_requests_is_one_frame(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        peer = bench.peer()
        welcome = await peer.hello()
        assert isinstance(welcome, Welcome) and welcome.incarnation == INCARNATION and welcome.facts == FACTS
        rids = [await bench.submit(peer) for _ in range(3)]
        await bench.until(lambda: len(bench.backend.submitted) == 3)
        for rid in rids:
            bench.service.output(rid, [7, 8], None, None)
        step = await peer.receive()
        assert isinstance(step, Step) and step.seq == 1 and [o.rid for o in step.outputs] == rids
        bench.service.output(rids[0], [9], {"type": "stop"}, {"prompt_tokens": 1})
        step = await peer.receive()
        assert (step.outputs[0].offset, step.outputs[0].token_ids) == (2, [9])
        assert step.outputs[0].finish == {"type": "stop"}

    run(tmp_path, test)


def test_a_step_in_one_call_is_the_same_as_an_output_for_each_row(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        peers = [bench.peer(), bench.peer()]
        for index, peer in enumerate(peers):
            await peer.hello(f"agent:{index}")
        rids = [await bench.submit(peer) for peer in peers for _ in range(2)]
        await bench.until(lambda: len(bench.backend.submitted) == 4)

        def each(rows: list[tuple[str, list[int]]]) -> None:
            for rid, token_ids in rows:
                bench.service.output(rid, token_ids, None, None)

        seen = []
        for put in (each, bench.service.step):
            put([(rids[0], [1]), (rids[2], [2, 3]), ("0" * 32, [4]), (rids[1], []), (rids[0], [5])])
            put([(rids[3], [6])])
            steps = [await peer.receive() for peer in peers]
            first = steps[0].outputs[0].offset
            seen.append([[(o.rid, o.offset - (first if o.rid == rids[0] else 0), o.token_ids) for o in s.outputs] for s in steps])
        assert seen[0][0] == [(rids[0], 0, [1, 5]), (rids[1], 0, [])]
        assert [o.offset for step in steps for o in step.outputs] == [2, 0, 2, 1]
        assert [[row[2] for row in step] for step in seen[1]] == [[row[2] for row in step] for step in seen[0]]
        assert (bench.service.numbers()["tokens"], bench.service.numbers()["outputs"]) == (2 * 5, 2 * 5)

    run(tmp_path, test)


def test_a_peer_without_credit_gets_merged_chunks_and_loses_nothing(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        slow, quick = bench.peer(), bench.peer()
        await slow.hello("agent:0")
        await quick.hello("agent:1")
        stuck, lively = await bench.submit(slow), await bench.submit(quick)
        await bench.until(lambda: len(bench.backend.submitted) == 2)
        total = WINDOW * 3
        for number in range(total):
            bench.service.output(stuck, [number], None, None)
            bench.service.output(lively, [number], None, None)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if number % 8 == 0:
                await quick.send(Credit(number + 1))
                await asyncio.sleep(0.002)
        received = [await slow.receive() for _ in range(WINDOW)]
        assert await slow.nothing_comes()
        assert [o.token_ids for s in received for o in s.outputs] == [[n] for n in range(WINDOW)]
        await slow.send(Credit(WINDOW))
        late = (await slow.receive()).outputs
        assert late[0].offset == WINDOW and late[0].token_ids == list(range(WINDOW, total))
        tokens: list[int] = []
        while len(tokens) < total:
            step = await quick.receive()
            await quick.send(Credit(step.seq))
            tokens += step.outputs[0].token_ids
        assert tokens == list(range(total))

    run(tmp_path, test)


def test_a_stalled_peer_is_cut_off_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL_SECONDS", 0.2)

    async def test(bench: Bench) -> None:
        slow, other = bench.peer(), bench.peer()
        await slow.hello("agent:0")
        await other.hello("agent:1")
        stuck, lively = await bench.submit(slow), await bench.submit(other)
        await bench.until(lambda: len(bench.backend.submitted) == 2)
        for number in range(WINDOW + 2):
            bench.service.output(stuck, [number], None, None)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await bench.until(lambda: bench.backend.aborted == [stuck])
        bench.service.output(lively, [1], None, None)
        assert (await other.receive()).outputs[0].token_ids == [1]
        frames = [await slow.receive() for _ in range(WINDOW + 1)]
        assert isinstance(frames[-1], Failed) and frames[-1].code == Code.STALLED

    run(tmp_path, test)


def test_a_new_life_aborts_what_the_old_one_left(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        old, new, other = bench.peer(), bench.peer(), bench.peer()
        await old.hello("agent:0")
        await other.hello("agent:1")
        left, kept = await bench.submit(old), await bench.submit(other)
        await bench.until(lambda: len(bench.backend.submitted) == 2)
        await new.hello("agent:0")
        assert bench.backend.aborted == [left]
        bench.service.output(kept, [1], None, None)
        assert (await other.receive()).outputs[0].token_ids == [1]

    run(tmp_path, test)


def test_a_peer_that_vanishes_is_forgotten_at_the_next_token(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        peer = bench.peer()
        await peer.hello()
        rid = await bench.submit(peer)
        await bench.until(lambda: rid in bench.backend.submitted)
        peer.socket.close(linger=0)
        bench.peers.remove(peer)

        def gone() -> bool:
            bench.service.output(rid, [1], None, None)
            return bench.backend.aborted == [rid]

        await bench.until(gone)
        assert bench.service.numbers()["peers"] == 0

    run(tmp_path, test)


def test_refusals_are_typed(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        peer = bench.peer()
        await bench.submit(peer)
        assert isinstance(await peer.receive(), Refused)
        refused = await peer.hello(protocol=PROTOCOL + 1)
        assert isinstance(refused, Refused) and "upgrade" in refused.reason
        assert isinstance(await peer.hello(protocol=PROTOCOL - 1), Welcome)
        await bench.submit(peer, incarnation=INCARNATION - 1)
        assert (await peer.receive()).code == Code.STALE
        for rid in ("a-1", "x" * 33):
            await peer.send(Submit(INCARNATION, rid, {}))
            assert (await peer.receive()).code == Code.INVALID
        rid = await bench.submit(peer)
        await peer.send(Submit(INCARNATION, rid, {}))
        assert (await peer.receive()).message == "request id is in use"
        await peer.send(Abort(uuid.uuid4().hex))
        await peer.send(Control(9, "nope", {}))
        done = await peer.receive()
        assert isinstance(done, ControlDone) and done.id == 9 and done.error is not None
        assert bench.backend.aborted == []

    run(tmp_path, test)


def test_an_answer_that_no_frame_can_carry_ends_its_own_request_alone(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        peer = bench.peer()
        await peer.hello()
        good, bad, last, failing = [await bench.submit(peer) for _ in range(4)]
        await bench.until(lambda: len(bench.backend.submitted) == 4)
        bench.service.output(good, [1], None, None)
        bench.service.output(bad, [2], None, {"native": object()})
        bench.service.output(last, [3], {"type": "stop"}, {"native": 2**64})
        frames = [await peer.receive() for _ in range(3)]
        failed = {frame.rid: frame.code for frame in frames if isinstance(frame, Failed)}
        (step,) = [frame for frame in frames if isinstance(frame, Step)]
        assert failed == {bad: Code.INTERNAL, last: Code.INTERNAL}
        assert step.seq == 1 and [output.rid for output in step.outputs] == [good]
        assert bench.backend.aborted == [bad], "the last one has ended by itself"
        bench.service.output(failing, [4], None, {"native": object()})
        bench.service.failed(failing, Code.INVALID, "no")
        frames = [await peer.receive() for _ in range(2)]
        assert [type(frame) for frame in frames] == [Failed, Failed]
        assert set(bench.service._streams) == {good}

    run(tmp_path, test)


def test_answers_that_are_too_large_together_go_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame past the socket's limit would cost the peer its connection."""
    monkeypatch.setattr(module, "REQUEST_MAX_BYTES", 1000)

    async def test(bench: Bench) -> None:
        peer = bench.peer()
        await peer.hello()
        rids = [await bench.submit(peer) for _ in range(3)]
        await bench.until(lambda: len(bench.backend.submitted) == 3)
        for rid, size in zip(rids, (600, 1000, 700), strict=True):
            bench.service.output(rid, [1], None, {"native": b"x" * size})
        frames = [await peer.receive() for _ in range(3)]
        steps = [frame for frame in frames if isinstance(frame, Step)]
        assert [(step.seq, [output.rid for output in step.outputs]) for step in steps] == [(1, [rids[0]]), (2, [rids[2]])]
        assert [frame.rid for frame in frames if isinstance(frame, Failed)] == bench.backend.aborted == [rids[1]]

    run(tmp_path, test)


def test_a_control_s_answer_that_no_frame_can_carry_is_an_error_and_codes_travel(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        peer = bench.peer()
        await peer.hello()

        async def control(op: str, args: dict[str, Any]) -> Any:
            match op:
                case "unknown":
                    raise RequestError(Code.UNKNOWN, "no engine route 'x'")
                case "breaks":
                    raise KeyError("x")
            return {"an": object()}

        bench.backend.control = control  # type: ignore[method-assign]
        for number, op in enumerate(("unknown", "breaks", "odd")):
            await peer.send(Control(number, op, {}))
        done = {frame.id: frame for frame in [await peer.receive() for _ in range(3)]}
        assert (done[0].error, done[0].code) == ("no engine route 'x'", Code.UNKNOWN)
        assert (done[1].error, done[1].code) == ("KeyError: 'x'", Code.INTERNAL)
        assert "TypeError" in done[2].error and done[2].code == Code.INTERNAL

    run(tmp_path, test)


def test_what_the_engine_serves_is_its_state_and_is_repeated(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.heart.set(State.LOADING)
        bench.service.serving(Serving(INCARNATION, paused=True))
        assert bench.heart.beat.state == State.LOADING, "an engine that isn't up is not paused"
        bench.heart.set(State.READY)
        for serving, state, way_back in (
            (Serving(INCARNATION, paused=True), State.PAUSED, "POST /engine/continue_generation"),
            (Serving(INCARNATION, paused=True, asleep=True), State.SLEEPING, "`sgnode wake`"),
            (Serving(INCARNATION, adapters={"a": 1}), State.READY, ""),
        ):
            bench.service.serving(serving)
            assert (bench.heart.beat.state, bench.heart.beat.waiting_for) == (state, way_back)
            assert list(bench.heart.repeat()) == [serving]

    run(tmp_path, test)


FRAMES = st.one_of(
    st.binary(max_size=200),
    st.binary(min_size=70_000, max_size=70_000),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=10,
    ).map(msgspec.msgpack.encode),
    st.sampled_from([sockets.encode(f)[:-1] for f in (Hello(1, "agent:0", "x"), Submit(3, "a" * 32, {}), Abort("b"), Credit(1))]),
    st.tuples(st.sampled_from(["Hello", "Submit", "Abort", "Control", "Credit"]), st.lists(st.integers(), max_size=4)).map(
        lambda made: msgspec.msgpack.encode([made[0], *[n % 2**31 for n in made[1]]])
    ),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.data_too_large])
@given(junk=st.lists(FRAMES, min_size=1, max_size=10), multipart=st.booleans())
def test_junk_is_counted_and_dropped_and_the_next_good_frame_works(
    tmp_path_factory: pytest.TempPathFactory, junk: list[bytes], multipart: bool
) -> None:
    async def test(bench: Bench) -> None:
        peer = bench.peer()
        assert isinstance(await peer.hello(), Welcome)
        for data in junk:
            await (peer.socket.send_multipart([data, data]) if multipart else peer.socket.send(data))
        await peer.send(Control(424242, "echo", {"still": "here"}))
        while True:
            frame = await peer.receive()
            if isinstance(frame, ControlDone) and frame.id == 424242:
                break
        assert frame.result == {"still": "here"}
        bad = sum(1 for data in junk if multipart or not _decodes(data))
        assert bench.service.numbers()["dropped_frames"] == bad

    run(tmp_path_factory.mktemp("junk"), test)


def _decodes(data: bytes) -> bool:
    try:
        msgspec.msgpack.decode(data, type=Hello | Submit | Abort | Control | Credit)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return True


def test_an_oversized_frame_costs_its_sender_the_connection_and_nobody_else(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        good, bad = bench.peer(), bench.peer()
        assert isinstance(await good.hello("agent:0"), Welcome)
        await bad.socket.send(b"\0" * (sockets.REQUEST_MAX_BYTES + 1))
        await good.send(Control(1, "echo", {}))
        assert isinstance(await good.receive(), ControlDone)
        later = bench.peer()
        assert isinstance(await later.hello("agent:1"), Welcome)

    run(tmp_path, test)
