"""The blocks that one DP rank of the running engine holds, as its events say. Pure: events in, changes out.

Only what is in the GPU's memory counts: Dynamo 1.6.1's publisher knows no other place (publish_stored).

When events are lost for good, every block is **unsure**: it may have been evicted meanwhile. Routers are told that it is gone,
and it comes back when an event proves that it is there. SGLang evicts from the GPU only what has no child there (0.5.23:
UnifiedTreeCore._is_device_leaf, RadixCache.evict), so a child that is stored proves all blocks before it.
"""

from array import array
from itertools import groupby, islice
from typing import Any

import msgspec

from procs.relay.kv.wire import AllBlocksCleared, BlockRemoved, BlockStored, Event

MEDIA = (None, "GPU")
CHAIN_BLOCKS = 256
"""A chain at most: the whole mirror is published in pieces of this size."""


class Block(msgspec.Struct, gc=False):
    """``tokens``: 4 bytes each. ``held``: how many nodes of SGLang's tree have this hash at least: several adapters' may."""

    parent: int | None
    tokens: bytes
    lora: str | None
    salt: str | None
    held: int = 1


class Chain(msgspec.Struct):
    """Blocks that follow one another, as publish_stored takes them.

    ``tokens``: block after block; with ``eagle`` one more at the end, each block's last pair reaching into the next.
    """

    parent: int | None
    hashes: list[int]
    tokens: list[int]
    lora: str | None
    salt: str | None
    eagle: bool


class Gone(msgspec.Struct):
    """Blocks that were there and aren't any more."""

    hashes: list[int]


Change = Chain | Gone


class Mirror:
    """``exact``: nothing was lost of this engine's events, or its cache was empty since. Otherwise blocks may be missing.

    ``blocks`` are there for certain, ``unsure`` ones perhaps: no more of them than there have been blocks at once.
    ``events`` taken, ``clears`` among them; ``unplaced``: blocks that couldn't be taken, because their parent isn't known or
    their size is another.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.blocks: dict[int, Block] = {}
        self.unsure: dict[int, Block] = {}
        self.exact = True
        self.events = self.clears = self.unplaced = 0
        self._most = 0

    def apply(self, event: Event) -> list[Change]:
        """Take an event; what others have to be told of it."""
        self.events += 1
        match event:
            case BlockStored():
                return self._stored(event) if event.medium in MEDIA else []
            case BlockRemoved():
                return self._removed(event.block_hashes) if event.medium in MEDIA else []
            case AllBlocksCleared():
                self.clears += 1
                self.exact = True  # of an empty cache everything is known
                self.unsure = {}
                return self._take_back()

    def lose(self) -> list[Change]:
        """Events are lost for good; what others have to be told."""
        self.exact = False
        self._most = max(self._most, len(self.blocks))
        self.unsure |= self.blocks
        for each in list(islice(self.unsure, max(0, len(self.unsure) - self._most))):
            del self.unsure[each]  # the one that was proved longest ago
        return self._take_back()

    def everything(self) -> list[Chain]:
        """All blocks, each after its parent. One whose parent is gone can't be reached by any prompt: it is left out."""
        chains: list[Chain] = []
        done: set[int] = set()
        for each in self.blocks:
            path: list[int] = []
            at: int | None = each
            while at is not None and at not in done and at in self.blocks:
                path.append(at)
                at = self.blocks[at].parent
            if at is not None and at not in done:
                continue
            for one in reversed(path):
                self._extend(chains, one)
                done.add(one)
        return chains

    def _take_back(self) -> list[Change]:
        gone: list[Change] = [Gone(list(self.blocks))] if self.blocks else []
        self.blocks = {}
        return gone

    def _stored(self, event: BlockStored) -> list[Change]:
        size, hashes, parent = self.block_size, event.block_hashes, event.parent_block_hash
        count = len(hashes)
        chains: list[Chain] = []
        if event.block_size != size or len(event.token_ids) != count * size or not self._prove(parent, chains):
            self.unplaced += count
            return []
        tokens = _flat(event.token_ids)
        more = len(tokens) - count * size  # 1 with pairs
        packed = array("i", tokens).tobytes()
        for known, group in groupby(range(count), lambda index: hashes[index] in self.blocks):
            indices = list(group)
            start, end = indices[0], indices[-1] + 1
            if known:
                for each in hashes[start:end]:
                    self.blocks[each].held += 1
                parent = hashes[end - 1]
                continue
            of_chain = tokens[start * size : end * size + more]
            chains.append(Chain(parent, hashes[start:end], of_chain, event.lora_name, event.cache_salt, bool(more)))
            for index in indices:
                self.unsure.pop(hashes[index], None)
                of_block = packed[index * size * 4 : ((index + 1) * size + more) * 4]
                self.blocks[hashes[index]] = Block(parent, of_block, event.lora_name, event.cache_salt)
                parent = hashes[index]
        return list(chains)

    def _prove(self, each: int | None, chains: list[Chain]) -> bool:
        """A child of this block is there, so it is too, and all before it. False: not all of them are known."""
        path: list[int] = []
        while each is not None and each not in self.blocks:
            if each not in self.unsure:
                return False
            path.append(each)
            each = self.unsure[each].parent
        for one in reversed(path):
            self.blocks[one] = self.unsure.pop(one)
            self.blocks[one].held = 1  # of more nodes there is no proof
            self._extend(chains, one)
        return True

    def _removed(self, hashes: list[int]) -> list[Change]:
        gone = []
        for each in hashes:
            block = self.blocks.get(each)
            if block is None:
                self.unsure.pop(each, None)
                continue
            block.held -= 1
            if block.held <= 0:
                del self.blocks[each]
                gone.append(each)
        return [Gone(gone)] if gone else []

    def _extend(self, chains: list[Chain], each: int) -> None:
        """Put a block at the end of the last chain if it follows there, else begin another."""
        block = self.blocks[each]
        tokens = array("i", block.tokens).tolist()
        eagle = len(tokens) > self.block_size
        last = chains[-1] if chains else None
        if (
            last is None
            or last.hashes[-1] != block.parent
            or (last.lora, last.salt, last.eagle) != (block.lora, block.salt, eagle)
            or len(last.hashes) >= CHAIN_BLOCKS
        ):
            chains.append(Chain(block.parent, [each], tokens, block.lora, block.salt, eagle))
            return
        if eagle:
            last.tokens.pop()  # it is the first of this block
        last.hashes.append(each)
        last.tokens += tokens


def _flat(tokens: list[Any]) -> list[int]:
    """Of pairs the first ones and the last one's second: each block's last pair reaches into the next block."""
    if tokens and isinstance(tokens[0], tuple):
        return [*(pair[0] for pair in tokens), tokens[-1][1]]
    return tokens
