"""Embeddings over NIXL: Dynamo's two protocols (1.6.1), on the process's agent or, for writing, on Dynamo's own.

Ends that die are heard of elsewhere, from the request's own stream; here a deadline of the caller is the last word. Memory that
the other side may still write to is given to nobody else.
"""

import asyncio
import base64
import contextlib
import logging
import os
from typing import Any

import msgspec
import torch
from dynamo.common.multimodal import NixlWriteEmbeddingSender
from dynamo.common.multimodal import embedding_transfer as wire

from procs.engine.adapter import nixl
from procs.engine.adapter.embeddings import RECEIVE_SECONDS, Inbox, Offered, Outbox, dtype_of, size_of
from procs.engine.adapter.side_loop import SideLoop
from shared.errors import Code, RequestError

ARENA_BYTES = 1 << 30
"""Registered once, for all embeddings that are on their way at a time. Memory that was never used takes none."""
ALIGNMENT = 64
POLL_SECONDS = 0.001
IDLE_SECONDS = 0.1
"""The same while nothing is on its way."""
SETTLE_SECONDS = 10.0
"""Between two questions to a sender whether it still means to write."""
GONE = b"gone:"
"""Our sender's answer to a receiver whose embeddings it has withdrawn; dynamo.sglang's ignore it."""


def outbox(mode: str) -> Outbox:
    """Raises NodeError without NIXL."""
    return WriteOutbox() if mode == "nixl-write" else ReadOutbox()


def inbox(mode: str) -> Inbox:
    """Raises NodeError without NIXL."""
    return WriteInbox() if mode == "nixl-write" else ReadInbox()


class ReadOutbox:
    """nixl-read's sending end."""

    def __init__(self) -> None:
        self._agent = nixl.agent()

    async def offer(self, embeddings: Any) -> Offered:
        shared = await self._agent.share(embeddings)
        transfer = wire.TransferRequest(
            embeddings_shape=list(embeddings.shape),
            embedding_dtype_str=wire.torch_dtype_to_string(embeddings.dtype),
            serialized_request=shared.metadata.model_dump(),
        )
        waiting = _quiet(asyncio.ensure_future(shared.fetched()))

        def withdraw() -> None:
            waiting.cancel()
            shared.withdraw()

        return transfer.model_dump(), waiting, withdraw


class ReadInbox:
    """nixl-read's receiving end."""

    def __init__(self) -> None:
        self._agent = nixl.agent()

    async def fetch(self, transfer: dict[str, Any]) -> Any:
        shape, metadata = transfer["embeddings_shape"], transfer["serialized_request"]
        if not isinstance(metadata, dict) or size_of(transfer) > ARENA_BYTES:
            raise RequestError(Code.INVALID, f"transfer_payload: expected NIXL's description of {ARENA_BYTES} bytes at most")
        return await self._agent.read(metadata, shape, dtype_of(transfer), RECEIVE_SECONDS)


def _quiet(waiting: "asyncio.Future[None]") -> "asyncio.Future[None]":
    """What became of it, for one who may have lost interest by then."""
    waiting.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return waiting


# --- the receiver says where, the sender writes there ------------------------------------------------------------------------


class WriteSender(NixlWriteEmbeddingSender):  # type: ignore[misc]
    """Dynamo's, in which each transfer fails alone, and one that nobody wants any more can be withdrawn."""

    def __init__(self) -> None:
        self._writing: dict[int, tuple[str, Any]] = {}
        """Receiver and NIXL's handle of what is being written."""
        super().__init__()

    async def _state_update(self) -> None:
        while True:
            if not self.transfer_tracker:  # a receiver may still ask for what was withdrawn
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(IDLE_SECONDS):
                        await self.transfer_queue.get()
            while not self.transfer_queue.empty():
                self.transfer_queue.get_nowait()
            for name, notes in self.nixl_agent.get_new_notifs().items():
                for note in notes:
                    try:
                        self._begin(name, *msgspec.msgpack.decode(note))
                    except Exception as error:  # of NIXL's own kinds; the others' embeddings go on
                        logging.warning("embeddings for %s: %s: %s", name, type(error).__name__, error)
            for number, (_, handle) in list(self._writing.items()):
                try:
                    state = self.nixl_agent.check_xfer_state(handle)
                except Exception as error:
                    state = f"{type(error).__name__}: {error}"
                if state != "PROC":
                    self.end(number, None if state == "DONE" else RuntimeError(f"NIXL transfer: {state}"))
            await asyncio.sleep(POLL_SECONDS)

    def _begin(self, name: str, number: int, where: Any, done: Any, metadata: bytes) -> None:
        """Write to a receiver that has said where."""
        if name not in self.remote_agents:
            self.remote_agents[name] = self.nixl_agent.add_remote_agent(metadata)
        if number not in self.transfer_tracker:
            self.nixl_agent.send_notif(name, GONE + str(done).encode())
            return
        if number in self._writing:  # it has asked twice
            return
        try:
            address, size, device, kind = where
            embeddings, source, _ = self.transfer_tracker[number]
            if size != embeddings.nbytes:
                raise ValueError(f"room for {size} bytes, {embeddings.nbytes} to write")
            target = self.nixl_agent.get_xfer_descs([(address, size, device)], mem_type=kind)
            handle = self.nixl_agent.initialize_xfer("WRITE", source, target, name, str(done).encode())
            self._writing[number] = name, handle
            self.nixl_agent.transfer(handle, str(done).encode())
        except Exception as error:
            self.end(number, error)
            if all(receiver != name for receiver, _ in self._writing.values()):  # others' writes to it go on
                self.nixl_agent.remove_remote_agent(self.remote_agents.pop(name))
            raise

    def withdraw(self, number: int) -> None:
        """Nobody wants it any more. What is being written stays until NIXL says that it is over.

        Over TCP a stopped receiver that goes on reads from memory that was given back: NIXL 1.5.0 dies of it (SIGSEGV).
        """
        if number not in self._writing:
            self.end(number)

    def end(self, number: int, error: Exception | None = None) -> None:
        """Of a transfer, or of the wait for one: memory and registration go. Doing it twice does no harm."""
        if (writing := self._writing.pop(number, None)) is not None:
            self.nixl_agent.release_xfer_handle(writing[1])
        if number in self.transfer_tracker:
            fetched = self.transfer_tracker[number][2]
            if error is not None and not fetched.done():
                fetched.set_exception(error)
            self._complete_transfer(number)


class _Side:
    """Runs what Dynamo's classes bring, an agent of their own, in a loop of its own."""

    def __init__(self, make: Any) -> None:
        nixl.prepare()
        self._side = SideLoop("nixl-write")

        async def made() -> Any:
            return make()

        self._end = asyncio.run_coroutine_threadsafe(made(), self._side.loop).result()


class WriteOutbox(_Side):
    """nixl-write's sending end."""

    def __init__(self) -> None:
        super().__init__(WriteSender)

    async def offer(self, embeddings: Any) -> Offered:
        request, fetched = await self._side.call(self._end.send_embeddings(embeddings, stage_embeddings=True))
        number = int(msgspec.json.decode(request.serialized_request)["tensor_id"])

        async def wait() -> None:
            await fetched

        waiting = _quiet(asyncio.ensure_future(self._side.call(wait())))

        def withdraw() -> None:
            waiting.cancel()
            self._side.loop.call_soon_threadsafe(self._end.withdraw, number)

        return request.model_dump(), waiting, withdraw


class Arena:
    """Ranges of one piece of memory, the first that fits. One that is never given back takes its own place only."""

    def __init__(self, size: int) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8)
        self._used: list[tuple[int, int]] = []
        self.freed = asyncio.Event()

    def take(self, size: int) -> int | None:
        """Where so many bytes are from now on; None while there is no room."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        start = 0
        for index, (used, end) in enumerate([*self._used, (len(self.memory), len(self.memory))]):
            if used - start >= size:
                self._used.insert(index, (start, start + size))
                return start
            start = end
        return None

    def give_back(self, start: int) -> None:
        self._used = [one for one in self._used if one[0] != start]
        self.freed.set()

    @property
    def used(self) -> int:
        """Bytes."""
        return sum(end - start for start, end in self._used)


class WriteReceiver:
    """Dynamo's protocol of NixlWriteEmbeddingReceiver, whose ring gives a range to the next while a late write may still come."""

    def __init__(self, size: int = ARENA_BYTES) -> None:
        api, options = wire._load_nixl_api()
        self._agent = api(f"receiver_{os.urandom(16).hex()}", options(num_threads=0, capture_telemetry=True))
        self.arena = Arena(size)
        self._agent.register_memory(self.arena.memory)
        self._metadata = self._agent.get_agent_metadata()
        self._known: set[str] = set()
        self._count = 0
        self._waiting: dict[tuple[str, bytes], asyncio.Future[None]] = {}
        self.late: dict[tuple[str, bytes], tuple[int, bytes, bytes]] = {}
        """Ranges that nobody waits for, and that their senders may still write to: whom to ask, and what they were asked."""
        self._looking: asyncio.Task[None] | None = None

    async def fetch(self, transfer: dict[str, Any]) -> Any:
        """Raises RequestError, and what NIXL raises."""
        try:
            asked = wire.NixlTransferRequest.model_validate_json(transfer["serialized_request"])
            metadata = base64.b64decode(asked.agent_metadata or "")
        except ValueError as error:
            raise RequestError(Code.INVALID, f"transfer_payload: {error}") from None
        size, sender = size_of(transfer), asked.sender_agent_id
        if asked.tensor_size != size or size > len(self.arena.memory):
            words = f"embeddings of {size} bytes, {asked.tensor_size} announced, {len(self.arena.memory)} at most"
            raise RequestError(Code.INVALID, words)
        while (start := self.arena.take(size)) is None:
            self.arena.freed.clear()
            await self.arena.freed.wait()
        self._count += 1
        place = self.arena.memory[start : start + size]
        number = self._count
        question = msgspec.msgpack.encode((asked.tensor_id, (place.data_ptr(), size, 0, "cpu"), number, self._metadata))
        key = (sender, str(number).encode())
        try:
            self._ask(sender, metadata, question)
        except BaseException:
            self.arena.give_back(start)
            raise
        self._waiting[key] = asyncio.get_running_loop().create_future()
        self._look()
        try:
            await self._waiting[key]
        except asyncio.CancelledError:
            self.late[key] = (start, metadata, question)
            raise
        except BaseException:  # it has said that it won't write
            self.arena.give_back(start)
            raise
        finally:
            del self._waiting[key]
        copy = place.clone().view(dtype_of(transfer)).view(transfer["embeddings_shape"])
        self.arena.give_back(start)
        return copy

    def _ask(self, sender: str, metadata: bytes, question: bytes) -> None:
        """A sender that has died is to be met anew."""
        try:
            if sender not in self._known:
                self._agent.add_remote_agent(metadata)
                self._known.add(sender)
            self._agent.send_notif(sender, notif_msg=question)
        except BaseException:
            if sender in self._known:
                self._known.discard(sender)
                self._agent.remove_remote_agent(sender)
            raise

    def _look(self) -> None:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._hear())

    async def _hear(self) -> None:
        """While somebody waits, or something may still come."""
        loop = asyncio.get_running_loop()
        again = loop.time() + SETTLE_SECONDS
        while self._waiting or self.late:
            for sender, notes in self._agent.get_new_notifs().items():
                for note in notes:
                    self._heard(sender, note)
            if loop.time() >= again:
                again = loop.time() + SETTLE_SECONDS
                self._settle()
            await asyncio.sleep(POLL_SECONDS if self._waiting else 100 * POLL_SECONDS)

    def _heard(self, sender: str, note: bytes) -> None:
        withdrawn = note.startswith(GONE)
        key = (sender, note.removeprefix(GONE))
        if key in self.late:
            self.arena.give_back(self.late.pop(key)[0])
        elif (waiting := self._waiting.get(key)) is not None and not waiting.done():
            if withdrawn:
                waiting.set_exception(RequestError(Code.PEER_DEAD, "the encode worker has withdrawn the embeddings"))
            else:
                waiting.set_result(None)

    def _settle(self) -> None:
        """Ask again: a sender that lives writes or says that it won't; one that has died is known by that."""
        for key, (start, metadata, question) in list(self.late.items()):
            try:
                self._ask(key[0], metadata, question)
            except Exception as error:
                logging.info("an encode worker is gone, and what it might have written to is free: %s", error)
                del self.late[key]
                self.arena.give_back(start)


class WriteInbox(_Side):
    """nixl-write's receiving end."""

    def __init__(self) -> None:
        super().__init__(WriteReceiver)

    async def fetch(self, transfer: dict[str, Any]) -> Any:
        return await self._side.call(self._end.fetch(transfer))
