"""The mirror of one DP rank: what routers are told at each event, and what a new one is told at once."""

import random
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from procs.relay.kv.mirror import CHAIN_BLOCKS, Chain, Change, Gone, Mirror
from procs.relay.kv.wire import Event, Reader
from tests.kv_player import BLOCK, CLEARED, removed, stored


def read(*events: Any) -> list[Event]:
    return list(Reader().read(msgspec.msgpack.encode([0.0, list(events), 0])))


class Router:
    """What a router knows from what it was told: each block's prompt, that is the tokens from the root on."""

    def __init__(self) -> None:
        self.prompts: dict[int, list[int]] = {}

    def tell(self, changes: list[Change] | list[Chain]) -> "Router":
        for change in changes:
            if isinstance(change, Gone):
                for each in change.hashes:
                    del self.prompts[each]
                continue
            before = [] if change.parent is None else self.prompts[change.parent]  # KeyError: told before its parent
            for index, each in enumerate(change.hashes):
                before = before + change.tokens[index * BLOCK : (index + 1) * BLOCK]
                self.prompts[each] = before
        return self


def play(mirror: Mirror, router: Router, *events: Any) -> None:
    for event in read(*events):
        router.tell(mirror.apply(event))


def test_maps_and_arrays_are_read_and_nonsense_is_counted() -> None:
    reader = Reader()
    array = ["BlockStored", [1, 2], None, [0] * 8, 4, None, "GPU"]
    events = [stored([1, 2]), array, ["BlockRemoved", [1]], CLEARED, {"type": "New"}, 7, ["Odd"], {"type": "BlockRemoved"}]
    found = list(reader.read(msgspec.msgpack.encode([0.0, events, None])))
    assert [type(each).__name__ for each in found] == ["BlockStored", "BlockStored", "BlockRemoved", "AllBlocksCleared"]
    assert found[0].block_hashes == found[1].block_hashes == [1, 2]  # type: ignore[union-attr]
    assert reader.dropped == 4
    assert list(reader.read(b"\xc1")) == [] and reader.dropped == 5


def test_a_chain_is_told_once_and_taken_back_block_by_block() -> None:
    mirror, router = Mirror(BLOCK), Router()
    (event,) = read(stored([1, 2, 3]))
    (chain,) = mirror.apply(event)
    assert isinstance(chain, Chain) and (chain.parent, chain.hashes, len(chain.tokens)) == (None, [1, 2, 3], 12)
    assert [type(each) for each in mirror.apply(read(stored([4], 3))[0])] == [Chain]
    router.tell(mirror.everything())
    play(mirror, router, removed(4, 3))
    assert router.prompts == {1: [10, 11, 12, 13], 2: [10, 11, 12, 13, 20, 21, 22, 23]}
    play(mirror, router, CLEARED)
    assert not router.prompts and not mirror.blocks


def test_a_hash_that_two_nodes_have_stays_until_both_are_gone_but_of_an_unsure_one_one_is_proved() -> None:
    mirror, router = Mirror(BLOCK), Router()
    play(mirror, router, stored([1]), stored([1], cache_salt="s"), removed(1))
    assert list(mirror.blocks) == list(router.prompts) == [1]
    play(mirror, router, stored([1], cache_salt="s"))
    router.tell(mirror.lose())
    play(mirror, router, stored([2], 1), removed(2))
    assert list(router.prompts) == [1]
    play(mirror, router, removed(1))
    assert not mirror.blocks and not mirror.unsure and not router.prompts
    play(mirror, router, stored([1]), stored([1], cache_salt="s"), removed(1))
    assert list(router.prompts) == [1], "both were stored since the loss"


def test_after_a_loss_blocks_come_back_when_an_event_proves_them_each_after_its_parent() -> None:
    mirror, router = Mirror(BLOCK), Router()
    play(mirror, router, stored([1, 2, 3]), stored([4], 2), stored([9]))
    before = dict(router.prompts)
    router.tell(mirror.lose())
    assert not router.prompts and not mirror.exact and len(mirror.unsure) == 5 and mirror.everything() == []
    play(mirror, router, stored([5], 3))  # proves 3, 2 and 1, but not 4
    assert sorted(router.prompts) == [1, 2, 3, 5] and sorted(mirror.unsure) == [4, 9]
    play(mirror, router, stored([4], 2))  # itself: it had been evicted
    play(mirror, router, stored([9, 10]))
    assert {each: router.prompts[each] for each in before} == before and not mirror.unsure
    assert Router().tell(mirror.everything()).prompts == router.prompts
    assert not mirror.exact, "what was stored in the lost frames is not known"


def test_an_unsure_block_that_is_removed_is_forgotten_and_proves_nothing_any_more() -> None:
    mirror, router = Mirror(BLOCK), Router()
    play(mirror, router, stored([1, 2, 3]))
    router.tell(mirror.lose())
    play(mirror, router, removed(3), removed(1, medium="CPU_PINNED"), stored([4], 3))
    assert not router.prompts and mirror.unplaced == 1 and sorted(mirror.unsure) == [1, 2]
    play(mirror, router, stored([6], 2, medium="CPU_PINNED"))
    assert not router.prompts, "what is in the host's memory proves nothing of the GPU's"


def test_a_cleared_cache_is_known_exactly_again() -> None:
    mirror, router = Mirror(BLOCK), Router()
    play(mirror, router, stored([1, 2]))
    router.tell(mirror.lose())
    play(mirror, router, CLEARED, stored([3], 2))
    assert mirror.exact and not mirror.unsure and mirror.clears == 1 and not router.prompts
    play(mirror, router, stored([3]))
    assert sorted(router.prompts) == [3]


def test_after_many_losses_no_more_blocks_are_kept_than_the_cache_ever_had() -> None:
    mirror, router = Mirror(BLOCK), Router()
    fresh = iter(range(1, 1000))
    for _ in range(10):
        play(mirror, router, stored([next(fresh) for _ in range(8)]))
        router.tell(mirror.lose())
        router.tell(mirror.lose())
        assert len(mirror.unsure) == 8 and not router.prompts
    play(mirror, router, stored([999], 80))
    assert sorted(router.prompts) == [*range(73, 81), 999], "the newest are kept"


def test_other_memory_other_sizes_and_unknown_parents_are_not_told() -> None:
    mirror = Mirror(BLOCK)
    refused = (stored([1], medium="CPU_PINNED"), stored([2], block_size=3), stored([3], 99), stored([5], token_ids=[1, 2]))
    assert all(mirror.apply(event) == [] for event in read(*refused))
    assert not mirror.blocks and mirror.unplaced == 3
    mirror.apply(read(stored([1]))[0])
    assert mirror.apply(read(removed(1, medium="CPU_PINNED"))[0]) == [] and list(mirror.blocks) == [1]
    assert mirror.apply(read(removed(7))[0]) == []


def test_pairs_of_an_eagle_engine_become_windows_that_overlap_by_one() -> None:
    pairs = [(each, each + 1) for each in range(8)]
    mirror = Mirror(BLOCK)
    (chain,) = mirror.apply(read(stored([1, 2], token_ids=pairs))[0])
    assert isinstance(chain, Chain) and chain.eagle and chain.tokens == list(range(9)) and chain.hashes == [1, 2]
    assert mirror.everything() == [chain]


def test_lora_and_salt_go_along() -> None:
    mirror = Mirror(BLOCK)
    (chain,) = mirror.apply(read(stored([1, 2], lora_name="a", cache_salt="s"))[0])
    assert isinstance(chain, Chain) and (chain.lora, chain.salt) == ("a", "s")
    mirror.apply(read(stored([3], 2, lora_name="b"))[0])
    assert [(each.lora, each.hashes) for each in mirror.everything()] == [("a", [1, 2]), ("b", [3])]


def test_what_hangs_on_a_block_that_is_gone_is_left_out() -> None:
    mirror = Mirror(BLOCK)
    for event in read(stored([1, 2, 3]), stored([5]), removed(2)):
        mirror.apply(event)
    assert sorted(Router().tell(mirror.everything()).prompts) == [1, 5]
    mirror.apply(read(stored([2], 1))[0])  # back, and now younger than its child
    assert sorted(Router().tell(mirror.everything()).prompts) == [1, 2, 3, 5]


def test_long_chains_come_in_pieces() -> None:
    mirror = Mirror(BLOCK)
    mirror.apply(read(stored(list(range(1, 3 * CHAIN_BLOCKS + 1))))[0])
    assert [len(chain.hashes) for chain in mirror.everything()] == [CHAIN_BLOCKS] * 3
    assert len(Router().tell(mirror.everything()).prompts) == 3 * CHAIN_BLOCKS


class Cache:
    """SGLang's cache on a GPU, and what can be proved of it by those of its events that were heard.

    ``blocks``: parents by hash. ``known``: heard of, and of no removal; ``recent``: those of them that were proved since the last
    loss but one. ``proved``: certainly there.
    """

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.blocks: dict[int, int | None] = {}
        self.parents: dict[int, int | None] = {}
        self.known: set[int] = set()
        self.recent: set[int] = set()
        self.proved: set[int] = set()
        self.surely: set[int] = set()
        self.names: dict[tuple[int | None, int], int] = {}

    def event(self) -> Any:
        """SGLang evicts leaves, stores chains of which some were there earlier, and is flushed now and then."""
        if self.blocks and self.chance.random() < 0.4:
            leaves = [each for each in self.blocks if each not in self.blocks.values()]
            gone = self.chance.sample(leaves, self.chance.randint(1, min(3, len(leaves))))
            for each in gone:
                del self.blocks[each]
            return removed(*gone)
        if self.chance.random() < 0.03:
            self.blocks.clear()
            return CLEARED
        parent, hashes = self.chance.choice([None, *self.blocks]), []
        at = parent
        for _ in range(self.chance.randint(1, 4)):
            # A hash stands for the whole prompt up to it: what comes again is the same.
            at = self.names.setdefault((at, self.chance.randint(0, 3)), len(self.names) + 1)
            if at in self.blocks:
                break
            hashes.append(at)
            self.blocks[at] = self.parents[at] = hashes[-2] if len(hashes) > 1 else parent
        return stored(hashes, parent) if hashes else removed()

    def path(self, each: int | None) -> set[int]:
        found = set()
        while each is not None:
            found.add(each)
            each = self.parents[each]
        return found

    def hear(self, event: Any) -> None:
        if event == CLEARED:
            for each in (self.known, self.recent, self.proved, self.surely):
                each.clear()
        elif event["type"] == "BlockRemoved":
            for each in (self.known, self.recent, self.proved, self.surely):
                each.difference_update(event["block_hashes"])
        else:
            before, hashes = self.path(event["parent_block_hash"]), set(event["block_hashes"])
            if before <= self.known:
                self.proved |= before | hashes
                self.known |= hashes
            if before <= self.recent:
                self.surely |= before | hashes
                self.recent |= hashes

    def lose(self) -> None:
        self.recent = self.surely
        self.proved, self.surely = set(), set()


@given(st.integers(0, 2**32), st.integers(1, 80), st.sampled_from([0, 0.05, 0.3]))
def test_a_router_believes_what_is_proved_and_never_what_is_not(seed: int, steps: int, loss: float) -> None:
    chance = random.Random(seed)
    cache, mirror, router = Cache(chance), Mirror(BLOCK), Router()
    for _ in range(steps):
        if chance.random() < loss:
            for _ in range(chance.randint(1, 5)):
                cache.event()
            cache.lose()
            router.tell(mirror.lose())
            continue
        event = cache.event()
        cache.hear(event)
        play(mirror, router, event)
        believed = router.prompts.keys()
        assert cache.surely <= believed <= cache.proved <= cache.blocks.keys()
        assert believed == mirror.blocks.keys() and not believed & mirror.unsure.keys()
        if mirror.exact:
            assert believed == cache.blocks.keys()
    assert Router().tell(mirror.everything()).prompts == router.prompts


@given(st.integers(0, 2**32), st.integers(1, 60))
def test_whoever_hears_everything_knows_what_those_know_who_heard_each_event(seed: int, steps: int) -> None:
    chance, mirror, router = random.Random(seed), Mirror(BLOCK), Router()
    parents: dict[int, int | None] = {}
    fresh = iter(range(1, 10_000))
    for _ in range(steps):
        if parents and chance.random() < 0.4:  # SGLang evicts leaves
            leaf = chance.choice([each for each in parents if each not in parents.values()])
            del parents[leaf]
            play(mirror, router, removed(leaf))
        else:
            parent = chance.choice([None, *parents])
            hashes = [next(fresh) for _ in range(chance.randint(1, 4))]
            parents |= dict(zip(hashes, [parent, *hashes], strict=False))
            play(mirror, router, stored(hashes, parent))
        assert mirror.blocks.keys() == parents.keys() == router.prompts.keys()
    assert Router().tell(mirror.everything()).prompts == router.prompts
