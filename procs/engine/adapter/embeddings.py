"""Embeddings of media on their way from an encode worker's engine to a prefill's: Dynamo's transfer classes, made safe.

What they lack is here: a deadline at both ends, an end of what nobody fetches, no file but an encoder's, no trust in a request's
numbers. SGLang 0.5.23's scheduler dies of embeddings that are fewer than the prompt's placeholders, and answers wrongly by a grid
that is not theirs.
"""

import asyncio
import json
import logging
import math
import os
import re
import stat
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from procs.engine.adapter import media
from procs.engine.adapter.shm import VARIABLE
from shared.errors import Code, RequestError

RECEIVE_SECONDS = 30.0
"""For embeddings to come."""
TAKEN_SECONDS = 60.0
"""For embeddings to be fetched: longer than that, so that nothing comes late at the other end."""
LOOK_SECONDS = 0.02
"""How often a file is looked for that its receiver removes."""
SHARED = Path("/dev/shm")
PLACES = (SHARED, Path("/tmp"))
"""Directories of encoders' files: ours, and that of dynamo.sglang 1.6.1 (TMPDIR)."""
NAME = re.compile(r"encoder_cache\.[0-9A-Za-z_-]{1,128}\.[0-9A-Za-z_]{1,32}\.safetensors")
HEADER_BYTES = 1 << 16
"""What a file may have beside the embeddings."""

Offered = tuple[dict[str, Any], Awaitable[None], Callable[[], None]]
"""How a receiver fetches an embedding (Dynamo's TransferRequest as plain data), when it has, and how to withdraw it."""


class Outbox(Protocol):
    """One mode's sending end."""

    async def offer(self, embeddings: Any) -> Offered:
        """Put a tensor where it can be fetched. It is the outbox's from now on."""


class Inbox(Protocol):
    """One mode's receiving end."""

    async def fetch(self, transfer: dict[str, Any]) -> Any:
        """The tensor; nothing else has its memory. Any exception means that it can't be had."""


def outbox(mode: str) -> Outbox:
    """Raises what the mode's library raises."""
    if mode == "local":
        return LocalOutbox()
    from procs.engine.adapter import embeddings_nixl

    return embeddings_nixl.outbox(mode)


def inbox(mode: str) -> Inbox:
    """Raises what the mode's library raises."""
    if mode == "local":
        return LocalInbox()
    from procs.engine.adapter import embeddings_nixl

    return embeddings_nixl.inbox(mode)


# --- sending --------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def offered(box: Outbox, embeddings: Any) -> AsyncIterator[tuple[dict[str, Any], Callable[[], Awaitable[None]]]]:
    """Its TransferRequest, and what to await until it was fetched; withdrawn at the end, whatever happens.

    Awaiting raises RequestError(PEER_DEAD) after TAKEN_SECONDS.
    """
    making = asyncio.ensure_future(box.offer(embeddings))
    try:
        # A cancelled thread goes on: what it makes has to be found.
        transfer, fetched, withdraw = await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(_withdraw)
        raise

    async def taken() -> None:
        try:
            async with asyncio.timeout(TAKEN_SECONDS):
                await fetched
        except TimeoutError:
            raise RequestError(Code.PEER_DEAD, f"no worker fetched the embeddings within {TAKEN_SECONDS:.0f} s") from None
        except Exception as error:
            raise RequestError(Code.PEER_DEAD, f"the embeddings were not fetched: {error}") from None

    try:
        yield transfer, taken
    finally:
        withdraw()


def _withdraw(making: "asyncio.Future[Offered]") -> None:
    if not making.cancelled() and making.exception() is None:
        making.result()[2]()


class LocalOutbox:
    """A file in shared memory, named so that the keeper removes it when this engine is killed."""

    def __init__(self) -> None:
        from dynamo.common.multimodal.embedding_transfer import LocalEmbeddingSender
        from safetensors.torch import save_file

        class Sender(LocalEmbeddingSender):  # type: ignore[misc]
            def save_embeddings_to_file(self, embedding_key: str, embeddings: Any) -> str:
                fd, path = tempfile.mkstemp(prefix=f"encoder_cache.{embedding_key}.", suffix=".safetensors", dir=SHARED)
                os.close(fd)
                try:
                    save_file({"ec_cache": embeddings.cpu().contiguous()}, path)
                except BaseException:
                    os.unlink(path)
                    raise
                return path

        self._sender = Sender()
        self._sender.sender_id = f"{os.environ.get(VARIABLE, 'sgnode')}-{uuid.uuid4().hex}"

    async def offer(self, embeddings: Any) -> Offered:
        request, _ = await self._sender.send_embeddings(embeddings)
        path = Path(request.serialized_request)

        loop = asyncio.get_running_loop()
        fetched: asyncio.Future[None] = loop.create_future()

        def look() -> None:
            if fetched.done():
                return
            if path.exists():
                loop.call_later(LOOK_SECONDS, look)
            else:
                fetched.set_result(None)

        def withdraw() -> None:
            fetched.cancel()
            path.unlink(missing_ok=True)

        look()
        return request.model_dump(), fetched, withdraw


# --- receiving ------------------------------------------------------------------------------------------------------------


class LocalInbox:
    """Reads an encoder's file and removes it."""

    def __init__(self) -> None:
        from dynamo.common.multimodal.embedding_transfer import LocalEmbeddingReceiver

        self._receiver = LocalEmbeddingReceiver()

    async def fetch(self, transfer: dict[str, Any]) -> Any:
        from dynamo.common.multimodal import TransferRequest

        check_file(transfer["serialized_request"], size_of(transfer))
        number, found = await self._receiver.receive_embeddings(TransferRequest(**transfer))
        return await asyncio.to_thread(self._copied, number, found)  # 0.2 s for 100 MB

    def _copied(self, number: int, found: Any) -> Any:
        copy = found.clone()  # of what is a mapped file
        try:
            self._receiver.release_tensor(number)
        except FileNotFoundError:  # its sender has withdrawn it meanwhile
            self._receiver.received_tensors.pop(number, None)
        return copy


def check_file(path: Any, size: int) -> None:
    """The request says which file: only an encoder's is opened, and removed. Raises RequestError, OSError."""
    place, _, name = path.rpartition("/") if isinstance(path, str) else ("", "", "")
    if place not in map(str, PLACES) or not NAME.fullmatch(name):
        raise RequestError(Code.INVALID, f"embeddings: no encoder's file: {str(path)[:120]!r}")
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        raise RequestError(Code.INVALID, f"embeddings: no encoder's file: {path}")
    if found.st_size > size + HEADER_BYTES:
        raise RequestError(Code.INVALID, f"embeddings: {found.st_size} bytes in {path}, {size} expected")


def dtype_of(transfer: dict[str, Any]) -> Any:
    """torch's."""
    from dynamo.common.multimodal.embedding_transfer import torch_dtype_from_string

    return torch_dtype_from_string(transfer["embedding_dtype_str"])


def size_of(transfer: dict[str, Any]) -> int:
    """Bytes of the embeddings."""
    return math.prod(transfer["embeddings_shape"]) * int(dtype_of(transfer).itemsize)


class Embeddings:
    """What a generating engine does with a payload's ``encoded``. ``box`` None: it never has embeddings (decode)."""

    def __init__(self, manager: Any, box: Inbox | None) -> None:
        from dynamo.sglang.request_handlers.multimodal.worker_handler import MultimodalConfig

        # dynamo.sglang 1.6.1 makes float16 of them in any case, which has less range than bfloat16.
        MultimodalConfig.EMBEDDINGS_DTYPE = manager.model_config.dtype
        self._manager = manager
        self._box = box
        self._shared: dict[str, _Share] = {}

    async def settle(self, payload: dict[str, Any]) -> None:
        """Turn ``encoded`` into arguments of async_generate. Raises RequestError."""
        from dynamo.sglang.protocol import MultiModalGroup, SglangMultimodalRequest
        from dynamo.sglang.request_handlers.multimodal.worker_handler import _build_decode_mm_items, _build_mm_items

        encoded = payload.pop("encoded", None)
        ids = payload.get("input_ids")
        if encoded is None:
            return
        check(encoded["multimodal_inputs"], ids if isinstance(ids, list) else [], self._manager, encoded["embeddings_shape"][1])
        groups = [MultiModalGroup(**item) for item in encoded["multimodal_inputs"]]
        request = SglangMultimodalRequest.model_construct(multimodal_inputs=groups)
        if encoded["transfer_payload"] is None:
            payload.update(_build_decode_mm_items(request, payload["bootstrap_room"]))
            return
        images, videos, *_ = await _build_mm_items(request, _received(await self._fetch(encoded)))
        payload.update({name: items for name, items in (("image_data", images), ("video_data", videos)) if items})

    async def _fetch(self, encoded: dict[str, Any]) -> Any:
        """Once for all samples of a request: the second would find nothing."""
        transfer, samples = encoded["transfer_payload"], encoded.get("samples", 1)
        if samples == 1:
            return await self._receive(transfer)
        key = json.dumps(transfer["serialized_request"], sort_keys=True)
        share = self._shared.get(key)
        if share is None:
            share = self._shared[key] = _Share(asyncio.ensure_future(self._receive(transfer)), samples)
            # Of an agent that has died not all samples come.
            asyncio.get_running_loop().call_later(RECEIVE_SECONDS, self._shared.pop, key, None)
        share.left -= 1
        if not share.left:
            self._shared.pop(key, None)
        return await asyncio.shield(share.tensor)

    async def _receive(self, transfer: dict[str, Any]) -> Any:
        if self._box is None:
            raise RequestError(Code.INVALID, "this engine takes no embeddings")
        try:
            async with asyncio.timeout(RECEIVE_SECONDS):
                found = await self._box.fetch(transfer)
        except RequestError:
            raise
        except TimeoutError:
            raise RequestError(Code.PEER_DEAD, f"the embeddings did not come within {RECEIVE_SECONDS:.0f} s") from None
        except Exception as error:  # of NIXL's own kinds, which need not be installed
            logging.warning("embeddings: %s: %s", type(error).__name__, error)
            raise RequestError(Code.PEER_DEAD, f"the embeddings can't be had: {type(error).__name__}: {error}") from None
        if list(found.shape) != transfer["embeddings_shape"] or found.dtype != dtype_of(transfer):
            raise RequestError(
                Code.INVALID, f"embeddings: {list(found.shape)} of {found.dtype} came, not as they were said to be"
            )
        return found


class _Share:
    def __init__(self, tensor: "asyncio.Future[Any]", left: int) -> None:
        self.tensor = tensor
        self.left = left


def _received(embeddings: Any) -> Any:
    """Dynamo's way from embeddings to SGLang's arguments, with embeddings that are here."""
    from dynamo.sglang.request_handlers.multimodal.worker_handler import EmbeddingsProcessor

    class Received(EmbeddingsProcessor):  # type: ignore[misc]
        def __init__(self) -> None: ...

        async def process_embeddings(self, request: Any) -> tuple[Any, int]:
            return embeddings, 0

        def release_embeddings(self, tensor_id: int) -> None: ...

    return Received()


def check(items: list[dict[str, Any]], ids: list[int], manager: Any, width: int) -> None:
    """Whether items, prompt and model fit. Raises RequestError(INVALID)."""
    expected = _width(manager)
    if expected and width != expected:
        raise RequestError(Code.INVALID, f"embeddings: {width} numbers a token, the model has {expected}")
    merge = _merge(manager)
    rows: dict[str, int] = {"image": 0, "video": 0}
    for item in items:
        kind = "image" if item["image_grid_thw"] else "video"
        patches, count = math.prod(item[f"{kind}_grid_thw"]), item["num_mm_tokens"]
        rows[kind] += count
        if patches != count * merge:
            raise RequestError(Code.INVALID, f"embeddings: {patches} patches of type {kind} are not {count} tokens")
    for kind, token in media._placeholders(manager).items():
        there, given = ids.count(token), rows.get(kind, 0)
        if there != given:
            raise RequestError(Code.INVALID, f"the prompt has {there} placeholders of type {kind} for {given} embeddings")


def _vision(manager: Any) -> Any:
    config = manager.model_config.hf_config
    return getattr(getattr(config, "thinker_config", None) or config, "vision_config", None)


def _width(manager: Any) -> int:
    """Numbers of one token's embedding, as SGLang's encoder has them (0.5.23, MMEncoder._infer_embedding_dims)."""
    vision = _vision(manager)
    stacked = getattr(vision, "deepstack_visual_indexes", None) or ()
    return int(getattr(vision, "out_hidden_size", None) or manager.model_config.hidden_size) * (1 + len(stacked))


def _merge(manager: Any) -> int:
    """Patches that become one token."""
    return int(getattr(_vision(manager), "spatial_merge_size", 1)) ** 2
