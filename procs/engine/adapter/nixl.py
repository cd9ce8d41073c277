"""This process's NIXL agent: reads of other processes' memory, memory that others read, and what is kept when a transfer is late.

    agent = nixl.agent()                                              # one a process, made by the first call (0.5 s, blocks)
    tensor = await agent.read(metadata, shape, dtype, seconds)        # raises RequestError; leaves nothing to clean up
    shared = await agent.share(tensor)                                # shared.metadata for the other side
    await shared.fetched()                                            # until it was read; bound that by a deadline
    shared.withdraw()                                                 # always, from any thread: see there
    await agent.call(coroutine)                                       # for classes that bring an agent of their own

NIXL 1.5.0 is not safe for threads and copies inside its calls, so all of it happens in a loop of its own. Nothing in it ends by
time, and over TCP memory that is freed under a transfer ends this process when the peer wakes up: past its deadline a transfer is
somebody else's error, and its memory is kept until it has ended.
"""

import asyncio
import base64
import binascii
import contextlib
import logging
import math
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import dynamo.nixl_connect as connect
from dynamo.nixl_connect import OperationStatus

from procs.engine.adapter.side_loop import SideLoop
from shared import nixl as host
from shared.errors import Code, NodeError, RequestError

T = TypeVar("T")

PROGRESS_MICROSECONDS = 1000
"""Pause of NIXL's progress thread. Its Python agent has none, which takes a core (0.016 of one with this)."""
PEERS = 64
"""Whose connections are kept. One that is let go of leaves a socket at both ends while the peer lives (NIXL 1.5.0)."""
READS = 16384
"""Of one peer until its connection is made anew: what is known of its memory grows with each."""
METADATA_BYTES = 1 << 20
"""Of an agent, unpacked: 330 bytes and about 120 for each registered piece of memory."""
LATE_BYTES = 1 << 30
"""Kept for late transfers, of this side's reads and of what it shares; past that neither begins until some have ended."""
LATE_SECONDS = 60.0
"""Memory that was withdrawn unread is kept for so long: longer than any reader waits."""
FIRST_PAUSE, LAST_PAUSE = 0.0002, 0.01
"""Seconds between two looks at a transfer, growing."""
LATE_PAUSE = 0.05
"""The same for a late one."""
BAD = (
    "nixlMismatchError", "nixlInvalidParamError", "nixlNotFoundError", "nixlNotSupportedError", "nixlNotAllowedError",
)  # fmt: skip
"""NIXL's errors that the other side's metadata are wrong; the others mean that it can't be reached."""


def prepare() -> None:
    """What has to be so before an agent is made. Doing it twice does no harm. Raises NodeError where NIXL is not installed."""
    os.environ.update(host.environment(os.environ))
    try:
        import nixl._api as api
    except ImportError as error:
        raise NodeError(f"NIXL can't be used: {error}") from error
    given: Any = api.nixlBind.nixlAgentConfig
    if hasattr(given, "paced"):
        return

    class Paced(given):  # type: ignore[misc]
        """The Python agent sets its pause to 0 and asks nobody."""

        paced = True

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, PROGRESS_MICROSECONDS if name == "pthrDelay" else value)

    api.nixlBind.nixlAgentConfig = Paced
    # An object that was not fully made complains when it goes: a Remote that could not be loaded.
    connect.Remote._released = True


class _Pinned(connect.Connector):  # type: ignore[misc]
    """Dynamo's Connector, which drops a peer after each operation: kept, it is connected once."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        """Of each peer a reference (Dynamo's Remote), and how often it was read."""

    async def begin_read(self, remote_metadata: Any, local_descriptors: Any) -> Any:
        # Here and not in the operation: one that was not fully made complains when it goes.
        remote = connect.Remote(await self._create_connection(), remote_metadata.nixl_metadata)
        before, reads = self._kept.pop(remote.name, (None, 0))
        self._kept[remote.name] = (remote, reads + 1)
        if before is not None:
            before._release()
        operation = await super().begin_read(remote_metadata, local_descriptors)
        if reads + 1 >= READS:
            self.forget(remote.name)
        while len(self._kept) > PEERS:
            self.forget(next(iter(self._kept)))
        return operation

    def forget(self, name: str) -> None:
        """The peer is dead, or is to be connected anew. Operations that run have a reference of their own."""
        remote, _ = self._kept.pop(name, (None, 0))
        if remote is not None:
            with contextlib.suppress(Exception):  # it is gone
                remote._release()

    def close(self) -> None:
        for name in list(self._kept):
            self.forget(name)
        self._shared_connection = None


class Shared:
    """Memory that one other process may read, once."""

    def __init__(self, agent: "Agent", operation: Any, size: int) -> None:
        self._agent = agent
        self.operation: Any = operation
        self.size = size
        self.metadata = operation.metadata()
        """For the reader: Dynamo's RdmaMetadata."""
        self.key = self.metadata.notification_key
        self.read = asyncio.Event()

    async def fetched(self) -> None:
        """Until it was read. Never, when the reader is gone."""
        await self._agent.call(_true(self.read))

    def withdraw(self) -> None:
        """Nobody needs it any more. Unread it is kept for LATE_SECONDS: a reader that has begun must find it."""
        self._agent.soon(self._agent.withdraw, self)


class Agent:
    """See the module. ``late_bytes``: the bound of what is kept for late transfers. Raises NodeError, and what NIXL raises."""

    def __init__(self, late_bytes: int = LATE_BYTES) -> None:
        prepare()
        self._most = late_bytes
        self._side = SideLoop("nixl")
        self._connector = _Pinned()
        self._open = 0
        self._shared: dict[str, Shared] = {}
        self._listening: asyncio.Task[None] | None = None
        self._late: set[asyncio.Task[None]] = set()
        self.late_bytes = 0
        self.read_bytes = 0
        making = asyncio.run_coroutine_threadsafe(self._connector._create_connection(), self._side.loop)
        try:
            self._nixl = making.result()._nixl
        except BaseException:
            self._side.close()
            raise

    def numbers(self) -> dict[str, float]:
        """For the engine's Beat. From any thread."""
        return {
            "nixl_read_bytes": self.read_bytes,
            "nixl_registered": self._open,
            "nixl_late": len(self._late),
            "nixl_late_bytes": self.late_bytes,
        }

    async def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it in the loop that has NIXL."""
        return await self._side.call(work)

    def soon(self, work: Callable[..., Any], *arguments: Any) -> None:
        """The same for a function, without its result. From any thread."""
        self._side.loop.call_soon_threadsafe(work, *arguments)

    # --- reading ------------------------------------------------------------------------------------------------------------

    async def read(self, metadata: Any, shape: Sequence[int], dtype: Any, seconds: float) -> Any:
        """Another process's memory as a tensor of ours. ``metadata``: Dynamo's RdmaMetadata, or a dict of its fields.

        Raises RequestError: INVALID for what describes no such memory, PEER_DEAD when it can't be read within ``seconds``,
        OVERLOADED when too much memory is kept for others that are late.
        """
        return await self._side.call(self._read(metadata, tuple(shape), dtype, seconds))

    async def _read(self, metadata: Any, shape: tuple[int, ...], dtype: Any, seconds: float) -> Any:
        import torch

        size = math.prod(shape) * int(dtype.itemsize)
        where = _checked(metadata, size)
        self._check_late(size)
        tensor = torch.empty(shape, dtype=dtype)
        operation = await self._begin(where, tensor)
        name = operation.remote.name
        try:
            async with asyncio.timeout(seconds):
                await _end(operation)
        except (TimeoutError, asyncio.CancelledError) as error:
            self.keep(lambda: _ended(operation), lambda: self._free(operation), size)
            if isinstance(error, TimeoutError):
                raise RequestError(Code.PEER_DEAD, f"memory of {name} was not read within {seconds:g} s") from None
            raise
        except Exception as error:  # NIXL's have no common class
            self._failed(operation, name)
            raise RequestError(Code.PEER_DEAD, f"memory of {name} can't be read: {_said(error)}") from None
        self._free(operation)
        self.read_bytes += size
        return tensor

    def _check_late(self, size: int) -> None:
        if self.late_bytes + size > self._most:
            words = f"{self.late_bytes >> 20} MB wait for transfers that are late; {self._most >> 20} MB at most"
            raise RequestError(Code.OVERLOADED, words)

    async def _begin(self, where: Any, tensor: Any) -> Any:
        """A second time when the first is refused: what is known of a peer may be in the way of what is new of it."""
        for again in (True, False):
            try:
                operation = await self._connector.begin_read(where, connect.Descriptor(tensor))
                self._open += 1
                return operation
            except Exception as error:
                if type(error).__name__ in BAD:
                    if again:
                        continue
                    raise RequestError(Code.INVALID, f"no memory that can be read: {_said(error)}") from None
                raise RequestError(Code.PEER_DEAD, f"its memory can't be reached: {_said(error)}") from None
        raise AssertionError("not reached")

    def _failed(self, operation: Any, name: str) -> None:
        self._free(operation)
        self._connector.forget(name)

    def _free(self, operation: Any) -> None:
        """Its handle and registration. The memory is its tensor's."""
        self._open -= 1
        try:
            operation._release()
        except Exception as error:  # of a peer that is gone, nothing else hangs on it
            logging.warning("NIXL: %s", _said(error))

    # --- being read ---------------------------------------------------------------------------------------------------------

    async def share(self, tensor: Any) -> Shared:
        """Let another process read it. It is kept, and must not be written to, until it is withdrawn.

        Raises RequestError(OVERLOADED) when too much is kept that was withdrawn unread, or for reads that are late.
        """
        return await self._side.call(self._share(tensor))

    async def _share(self, tensor: Any) -> Shared:
        self._check_late(tensor.nbytes)
        descriptor = connect.Descriptor(tensor)
        shared = Shared(self, await self._connector.create_readable(descriptor), descriptor.size)
        self._open += 1
        self._shared[shared.key] = shared
        if self._listening is None or self._listening.done():
            self._listening = asyncio.get_running_loop().create_task(self._listen())
        return shared

    async def _listen(self) -> None:
        """NIXL says who has read what, to one who asks."""
        while self._shared:
            self._heard()
            await asyncio.sleep(0.001)

    def _heard(self) -> None:
        try:
            found = self._nixl.get_new_notifs()
        except Exception as error:
            logging.warning("NIXL: %s", _said(error))
            return
        for keys in found.values():
            for key in keys:
                if (shared := self._shared.get(key.decode(errors="replace"))) is not None:
                    shared.read.set()

    def withdraw(self, shared: Shared) -> None:
        """In NIXL's loop; twice does no harm."""
        if shared.key not in self._shared:
            return
        self._heard()
        if shared.read.is_set():
            self._unshare(shared)
            return
        end = asyncio.get_running_loop().time() + LATE_SECONDS

        def ended() -> bool:
            return shared.read.is_set() or asyncio.get_running_loop().time() > end

        self.keep(ended, lambda: self._unshare(shared), shared.size)

    def _unshare(self, shared: Shared) -> None:
        del self._shared[shared.key]
        operation, shared.operation = shared.operation, None  # it holds the agent
        self._free(operation)

    # --- what is late -------------------------------------------------------------------------------------------------------

    def keep(self, ended: Callable[[], bool], free: Callable[[], None], size: int) -> None:
        """Keep memory until a transfer has ended: ``ended`` says so, or raises because it has failed. In NIXL's loop."""

        async def wait() -> None:
            try:
                while True:
                    if ended():
                        break
                    await asyncio.sleep(LATE_PAUSE)
            except Exception as error:
                logging.info("a late transfer failed: %s", _said(error))
            free()
            self.late_bytes -= size

        self.late_bytes += size
        task = asyncio.get_running_loop().create_task(wait())
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    def close(self) -> None:
        """No transfer is begun any more. What is late stays until the process ends, and with it the agent."""
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._close(), self._side.loop).result(5)
        self._side.close()

    async def _close(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
        if not self._late:
            for shared in list(self._shared.values()):
                self._unshare(shared)
        if self._open:
            _LEFT.append(self)
            return
        self._connector.close()
        del self._nixl


_LEFT: list[Agent] = []
"""Agents whose memory a peer may still write to."""
_AGENTS: list[Agent] = []
"""None or one."""


def agent(late_bytes: int = LATE_BYTES) -> Agent:
    """This process's agent."""
    if not _AGENTS:
        _AGENTS.append(Agent(late_bytes))
    return _AGENTS[0]


def numbers() -> dict[str, float]:
    """For the engine's Beat; none where there is no agent."""
    return _AGENTS[0].numbers() if _AGENTS else {}


def close() -> None:
    """The process's agent ends."""
    if _AGENTS:
        _AGENTS.pop().close()


def _checked(metadata: Any, size: int) -> Any:
    """RdmaMetadata of one piece of so many bytes. Raises RequestError(INVALID)."""
    try:
        where = metadata if isinstance(metadata, connect.RdmaMetadata) else connect.RdmaMetadata(**metadata)
        packed = where.nixl_metadata
        raw = base64.b64decode(packed[4:], validate=True) if packed.startswith("b64:") else bytes.fromhex(packed)
        unpacked = zlib.decompressobj()
        unpacked.decompress(raw, METADATA_BYTES)
        if not unpacked.eof:
            raise ValueError(f"more than {METADATA_BYTES} bytes of metadata, or not all of them")
        if where.operation_kind != connect.OperationKind.READ:
            raise ValueError("it is not to be read")
        sizes = [descriptor.size for descriptor in where.descriptors]
    except (ValueError, TypeError, binascii.Error, zlib.error) as error:  # pydantic's are ValueErrors
        raise RequestError(Code.INVALID, f"no memory that can be read: {_said(error)}") from None
    if sizes != [size]:
        raise RequestError(Code.INVALID, f"memory of {sizes} bytes, {size} expected")
    return where


def _pauses() -> Iterator[float]:
    pause = FIRST_PAUSE
    while True:
        yield pause
        pause = min(pause * 1.5, LAST_PAUSE)


async def _end(operation: Any) -> None:
    """Begin it, and wait for its end. Raises when it fails."""
    for pause in _pauses():
        if _ended(operation):
            return
        await asyncio.sleep(pause)


def _ended(operation: Any) -> bool:
    """Raises when it has failed. The first look begins it."""
    status = operation.status
    if status in (OperationStatus.INITIALIZED, OperationStatus.IN_PROGRESS):
        return False
    if status != OperationStatus.COMPLETE:
        raise ConnectionError("the transfer has failed")
    return True


async def _true(event: asyncio.Event) -> None:
    await event.wait()


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
