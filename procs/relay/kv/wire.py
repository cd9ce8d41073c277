"""SGLang's KV events as they are on the wire (sglang 0.5.23, srt/disaggregation/kv_events.py), decoded one by one."""

from collections.abc import Iterator
from typing import Any

import msgspec

from shared.sockets import Decoder


class BlockStored(msgspec.Struct, tag=True, gc=False):
    """Blocks that follow one another; the first one's parent is ``parent_block_hash``. Hashes are signed 64-bit numbers.

    ``token_ids``: ``block_size`` for each block; pairs of neighbours with an EAGLE-like algorithm.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int | tuple[int, int]]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    lora_name: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, gc=False):
    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, gc=False):
    """After flush_cache."""


Event = BlockStored | BlockRemoved | AllBlocksCleared

FIELDS = {kind.__name__: kind.__struct_fields__ for kind in (BlockStored, BlockRemoved, AllBlocksCleared)}


class Batch(msgspec.Struct, array_like=True, gc=False):
    """One frame. ``dp_rank`` is not used: each rank has a socket of its own."""

    ts: float
    events: list[msgspec.Raw]
    dp_rank: int | None = None


class Reader:
    """Decodes frames; what can't be read is counted in ``dropped``. Never raises."""

    def __init__(self) -> None:
        self._batches: Decoder[Batch] = Decoder(Batch, "SGLang's KV events")
        self._event: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)

    @property
    def dropped(self) -> int:
        return self._batches.dropped

    def drop(self, why: str) -> None:
        self._batches.drop(why)

    def read(self, payload: bytes) -> Iterator[Event]:
        batch = self._batches.decode(payload)
        for raw in batch.events if batch is not None else ():
            try:
                yield self._decode(memoryview(raw))
            except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, TypeError) as error:
                self.drop(f"{type(error).__name__}: {error}")

    def _decode(self, raw: memoryview) -> Event:
        if raw[0] & 0xF0 == 0x80 or raw[0] in (0xDE, 0xDF):
            return self._event.decode(raw)
        # SGLang up to 0.5.16: an array, its kind first.
        values: list[Any] = msgspec.msgpack.decode(raw, type=list[Any])
        fields = {"type": values[0], **dict(zip(FIELDS[values[0]], values[1:], strict=False))}
        event: Event = msgspec.convert(fields, type=Event)
        return event
