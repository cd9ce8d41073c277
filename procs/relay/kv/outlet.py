"""Publishers by worker id and DP rank: each has the whole mirror of its rank from its first moment on."""

from collections.abc import Callable, Mapping
from typing import Protocol

from procs.relay.kv.mirror import Chain, Change, Mirror

REMOVED_BLOCKS = 4096
"""In one removal at most."""


class Publisher(Protocol):
    """What is used of dynamo.llm.KvEventPublisher (1.6.1). Calls are queued, they neither block nor fail."""

    def publish_stored(
        self,
        token_ids: list[int],
        num_block_tokens: list[int],
        block_hashes: list[int],
        parent_hash: int | None = None,
        *,
        lora_name: str | None = None,
        is_eagle: bool | None = None,
        cache_salt: str | None = None,
    ) -> None: ...

    def publish_removed(self, block_hashes: list[int]) -> None: ...

    def shutdown(self) -> None:
        """Take it out of discovery: a router then forgets all of its blocks."""


Open = Callable[[int, int, int], Publisher]
"""Makes the publisher for a worker id, a DP rank and a block size."""


class Outlet:
    """What is published, and as whom."""

    def __init__(self) -> None:
        self._publishers: dict[tuple[int, int], Publisher] = {}

    @property
    def shown(self) -> set[tuple[int, int]]:
        """(worker id, DP rank) of each publisher."""
        return set(self._publishers)

    def show(self, workers: set[int], mirrors: Mapping[int, Mirror], make: Open) -> None:
        """Publish these mirrors under these workers and under no others."""
        for key in self.shown:
            if key[0] not in workers or key[1] not in mirrors:
                self._publishers.pop(key).shutdown()
        for worker in sorted(workers):
            for rank, mirror in mirrors.items():
                if (worker, rank) not in self._publishers:
                    made = self._publishers[worker, rank] = make(worker, rank, mirror.block_size)
                    for chain in mirror.everything():
                        _publish(made, chain, mirror.block_size)

    def publish(self, rank: int, changes: list[Change], block_size: int) -> None:
        for key, publisher in self._publishers.items():
            if key[1] == rank:
                for change in changes:
                    _publish(publisher, change, block_size)

    def close(self) -> None:
        """Take everything back: there is no clear, and without its publisher a router has no block of a rank."""
        for publisher in self._publishers.values():
            publisher.shutdown()
        self._publishers.clear()


def _publish(publisher: Publisher, change: Change, block_size: int) -> None:
    if isinstance(change, Chain):
        sizes = [block_size] * len(change.hashes)
        publisher.publish_stored(
            change.tokens, sizes, change.hashes, change.parent,
            lora_name=change.lora, is_eagle=change.eagle or None, cache_salt=change.salt,
        )  # fmt: skip
        return
    for start in range(0, len(change.hashes), REMOVED_BLOCKS):
        publisher.publish_removed(change.hashes[start : start + REMOVED_BLOCKS])
