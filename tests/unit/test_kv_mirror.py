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


def test_a_hash_that_two_nodes_have_stays_until_both_are_gone_but_not_when_events_were_lost() -> None:
    for exact, left in ((True, [1]), (False, [])):
        mirror = Mirror(BLOCK)
        for event in read(stored([1]), stored([1], cache_salt="s")):
            mirror.apply(event)
        mirror.exact = exact
        mirror.apply(read(removed(1))[0])
        assert list(mirror.blocks) == left


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
