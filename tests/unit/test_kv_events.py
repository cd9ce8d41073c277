"""KV events as a relay publishes them: played sockets in, a recording stand-in for Dynamo's runtime out."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import zmq

from procs.relay.kv import kv as module
from procs.relay.kv.kv import KvEvents
from procs.relay.kv.mirror import Chain, Gone
from procs.relay.kv.records import Records
from shared import kv_sources
from shared.config import NodeConfig
from shared.frames import Beat
from shared.kv_sources import KvSource, KvSources
from tests.kv_player import BLOCK, CLEARED, Player, removed, stored
from tests.unit.test_kv_mirror import Router


class Publisher:
    """Records what KvEventPublisher is told, and what a router knows by that."""

    def __init__(self) -> None:
        self.router = Router()
        self.open = True

    def publish_stored(
        self, token_ids: list[int], num_block_tokens: list[int], block_hashes: list[int], parent_hash: int | None = None,
        *, lora_name: str | None = None, is_eagle: bool | None = None, cache_salt: str | None = None,
    ) -> None:  # fmt: skip
        assert self.open and num_block_tokens == [BLOCK] * len(block_hashes)
        self.router.tell([Chain(parent_hash, block_hashes, token_ids, lora_name, cache_salt, bool(is_eagle))])

    def publish_removed(self, block_hashes: list[int]) -> None:
        assert self.open
        self.router.tell([Gone(block_hashes)])

    def shutdown(self) -> None:
        self.open = False


class Runtime:
    def __init__(self) -> None:
        self.made: dict[tuple[int, int], Publisher] = {}
        self.ended = self.gone = self.closed = False
        self.cleared: list[set[tuple[int, int]]] = []

    def publisher(self, worker: int, rank: int, block_size: int) -> Publisher:
        assert block_size == BLOCK
        self.made[worker, rank] = Publisher()
        return self.made[worker, rank]

    def clear(self, keys: set[tuple[int, int]]) -> int:
        assert not any(key in self.made and self.made[key].open for key in keys), "our own"
        self.cleared.append(keys)
        return 0

    def missing(self, keys: set[tuple[int, int]]) -> bool:
        return self.gone and bool(keys)

    def close(self) -> None:
        self.closed = True

    @property
    def known(self) -> dict[tuple[int, int], list[int]]:
        """Blocks that a router knows, by worker and rank."""
        return {key: sorted(made.router.prompts) for key, made in self.made.items() if made.open}


class Scene:
    def __init__(self, player: Player) -> None:
        self.player = player
        self.runtimes: list[Runtime] = []
        self.failing = False
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        config = NodeConfig(
            name="t", runtime_dir="/nowhere", version="0", role="aggregated", model_path="m", served_model_name="m"
        )
        self.kv = KvEvents(config, self.context, lambda: None, self.open)

    async def open(self, _: NodeConfig) -> Runtime:
        if self.failing:
            raise Exception("no etcd here")  # Dynamo's are bare
        self.runtimes.append(Runtime())
        return self.runtimes[-1]

    @property
    def runtime(self) -> Runtime:
        return self.runtimes[-1]

    def engine(self, incarnation: int = 1, state: str = "ready", *, replay: bool = True) -> None:
        where = KvSource(self.player.events, self.player.replay if replay else None)
        info = kv_sources.say(KvSources(BLOCK, {0: where}))
        self.kv.hear(Beat("engine", 1, state, "", 0.0, "", incarnation, 0, {}, info))

    def workers(self, *workers: int) -> None:
        self.kv.hear(Beat("coordinator", 1, "ready", "", 0.0, "", 0, 0, {}, {"workers": ",".join(map(str, workers))}))

    async def until(self, condition: Callable[[], Any], seconds: float = 5) -> None:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def known(self, wanted: dict[tuple[int, int], list[int]]) -> None:
        try:
            await self.until(lambda: self.runtimes and self.runtime.known == wanted)
        except TimeoutError:
            raise AssertionError([runtime.known for runtime in self.runtimes]) from None


def run(test: Callable[[Scene], Awaitable[None]]) -> None:
    async def main() -> None:
        with Player() as player:
            scene = Scene(player)
            try:
                await test(scene)
            finally:
                scene.kv.close()
                scene.context.destroy(linger=0)
                assert all(not runtime.known for runtime in scene.runtimes), "closed with the relay"

    asyncio.run(main())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(module, "GONE_SECONDS", 0.1)


def test_no_runtime_is_made_without_events_to_publish() -> None:
    async def test(scene: Scene) -> None:
        scene.workers(7)
        scene.kv.hear(Beat("engine", 1, "ready", "", 0.0, "", 1, 0))
        scene.engine(2, "loading")
        await asyncio.sleep(0.1)
        assert not scene.runtimes and scene.kv.numbers() == {} and scene.kv.detail == ""

    run(test)


def test_every_worker_has_every_block_and_a_new_one_has_them_at_once() -> None:
    async def test(scene: Scene) -> None:
        scene.player.say(stored([1, 2]), stored([3], 2))
        scene.engine()
        scene.workers(7, 8)
        await scene.known({(7, 0): [1, 2, 3], (8, 0): [1, 2, 3]})
        await scene.until(lambda: scene.runtime.cleared == [{(7, 0), (8, 0)}])
        scene.player.say(removed(3), stored([4, 5], 2))
        await scene.known({(7, 0): [1, 2, 4, 5], (8, 0): [1, 2, 4, 5]})
        old = scene.runtime.made[8, 0]
        scene.workers(7, 9)
        await scene.until(lambda: (9, 0) in scene.runtime.made)
        scene.player.say(CLEARED, stored([6]))
        async with asyncio.timeout(5):
            while old.open:
                scene.workers(7, 9)
                await asyncio.sleep(0.05)
        await scene.known({(7, 0): [6], (9, 0): [6]})
        assert scene.kv.numbers()["kv_publishers"] == 2 and scene.kv.numbers()["kv_blocks_dp0"] == 1
        assert scene.kv.numbers()["kv_events_dp0"] == 6

    run(test)


def test_a_worker_that_is_missed_in_one_beat_keeps_its_publisher() -> None:
    async def test(scene: Scene) -> None:
        scene.player.say(stored([1]))
        scene.engine()
        scene.workers(7)
        await scene.known({(7, 0): [1]})
        made = scene.runtime.made[7, 0]
        scene.workers()
        await asyncio.sleep(0.05)
        scene.workers(7)
        await asyncio.sleep(0.1)
        assert made.open and scene.runtime.made[7, 0] is made

    run(test)


def test_blocks_go_with_their_engine_and_the_next_one_begins_with_none() -> None:
    async def test(scene: Scene) -> None:
        scene.player.say(stored([1, 2]))
        scene.engine(3)
        scene.workers(7)
        await scene.known({(7, 0): [1, 2]})
        scene.kv.dead(2)
        scene.engine(3)
        assert scene.runtime.known == {(7, 0): [1, 2]}, "an old death"
        scene.kv.dead(3)
        assert scene.runtime.known == {} and scene.kv.numbers() == {}
        scene.engine(3)  # a last beat, heard after the death
        await asyncio.sleep(0.1)
        assert scene.runtime.known == {}
        with Player() as player:
            scene.player = player
            player.say(stored([9]))
            scene.engine(4)
            await scene.known({(7, 0): [9]})
            scene.kv.dead(4)

    run(test)


def test_a_new_engine_whose_predecessor_s_death_was_not_heard_begins_with_none() -> None:
    async def test(scene: Scene) -> None:
        scene.player.say(stored([1]))
        scene.engine(1)
        scene.workers(7)
        await scene.known({(7, 0): [1]})
        first = scene.runtime.made[7, 0]
        with Player() as player:
            scene.player = player
            player.say(stored([2]))
            scene.engine(2)
            assert not first.open
            await scene.known({(7, 0): [2]})
            scene.kv.dead(2)

    run(test)


def test_each_dp_rank_is_a_source_of_its_own() -> None:
    async def test(scene: Scene) -> None:
        with Player() as other:
            ranks = {2: KvSource(scene.player.events, scene.player.replay), 3: KvSource(other.events, other.replay)}
            info = kv_sources.say(KvSources(BLOCK, ranks))
            scene.player.say(stored([1]))
            scene.kv.hear(Beat("engine", 1, "ready", "", 0.0, "", 1, 0, {}, info))
            scene.workers(7)
            await scene.known({(7, 2): [1], (7, 3): []})
            other.say(stored([1]), stored([5], 1))
            await scene.known({(7, 2): [1], (7, 3): [1, 5]})
            assert scene.kv.numbers()["kv_blocks_dp2"] == 1 and scene.kv.numbers()["kv_blocks_dp3"] == 2
            scene.kv.dead(1)

    run(test)


def test_a_runtime_that_has_ended_is_replaced_and_everything_published_again() -> None:
    async def test(scene: Scene) -> None:
        scene.player.say(stored([1, 2]))
        scene.engine()
        scene.workers(7)
        await scene.known({(7, 0): [1, 2]})
        scene.runtime.ended = True
        await scene.until(lambda: len(scene.runtimes) == 2)
        assert scene.runtimes[0].closed and not scene.runtimes[0].known
        await scene.known({(7, 0): [1, 2]})
        first = scene.runtime.made[7, 0]
        scene.runtime.gone = True
        await scene.until(lambda: scene.runtime.made[7, 0] is not first)
        scene.runtime.gone = False
        assert not first.open
        await scene.known({(7, 0): [1, 2]})

    run(test)


def test_while_discovery_is_not_there_it_is_said_and_tried_again() -> None:
    async def test(scene: Scene) -> None:
        scene.failing = True
        scene.player.say(stored([1]))
        scene.engine()
        scene.workers(7)
        await scene.until(lambda: scene.kv.detail == "KV events are not published: no etcd here")
        scene.failing = False
        await scene.known({(7, 0): [1]})
        await scene.until(lambda: scene.kv.detail == "")

    run(test)


def test_a_loss_that_nobody_can_make_good_is_said_and_withdraws_what_is_not_proved() -> None:
    async def test(scene: Scene) -> None:
        scene.player.say(stored([1, 2]), stored([3]))
        scene.engine()
        scene.workers(7, 8)
        await scene.known({(7, 0): [1, 2, 3], (8, 0): [1, 2, 3]})
        numbers = scene.kv.numbers()
        assert (numbers["kv_event_frames_replayed_dp0"], numbers["kv_blocks_unvouched_dp0"]) == (1, 0)
        scene.player.say(removed(3), heard=False)
        scene.player.forget()
        scene.player.say(stored([4], 1))
        await scene.known({(7, 0): [1, 4], (8, 0): [1, 4]})
        assert "KV events of DP rank 0 are incomplete: 1 frames lost (replay_endpoint has them no longer)" in scene.kv.detail
        numbers = scene.kv.numbers()
        assert (numbers["kv_event_gaps_dp0"], numbers["kv_event_frames_lost_dp0"], numbers["kv_blocks_unvouched_dp0"]) == (
            1,
            1,
            2,
        )
        scene.workers(7, 8, 9)
        await scene.known({key: [1, 4] for key in ((7, 0), (8, 0), (9, 0))})
        scene.player.say(CLEARED)
        await scene.until(lambda: scene.kv.detail == "")
        numbers = scene.kv.numbers()
        assert (numbers["kv_events_cleared_dp0"], numbers["kv_blocks_unvouched_dp0"], numbers["kv_blocks_dp0"]) == (1, 0, 0)

    run(test)


def test_a_loss_without_a_replay_socket_names_the_flag() -> None:
    async def test(scene: Scene) -> None:
        scene.player.say(stored([1]))
        scene.engine(replay=False)
        scene.workers(7)
        number = 1
        while not scene.kv.detail:
            number += 1
            scene.player.say(stored([number]))
            await asyncio.sleep(0.02)
        assert "no replay_endpoint in --kv-events-config" in scene.kv.detail

    run(test)


# --- the file store's records ---

SCOPE = "namespace/n/component/c/endpoint/generate/"


def record(store: Path, publisher: str, worker: int, rank: int, scope: str = SCOPE) -> tuple[Path, Path]:
    """As Dynamo 1.6.1 writes them."""
    source = {
        "type": "EventSource", "topic": "kv-events", "publisher_id": int(publisher, 16),
        "metadata": {"worker": {"worker_id": worker, "dp_rank": rank}, "publisher_id": int(publisher, 16)},
    }  # fmt: skip
    paths = []
    for kind in ("event_sources", "event_channels"):
        path = store / "v1" / kind / quote(f"{scope}topic/kv-events/{publisher}", safe="")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(source))
        paths.append(path)
    return paths[0], paths[1]


def test_only_what_an_earlier_relay_left_for_these_ranks_is_removed(tmp_path: Path) -> None:
    records = Records(tmp_path, "n.c.generate")
    assert records.remove({(1, 0)}) == 0 and records.missing({(1, 0)}) and not records.missing(set())
    left = [record(tmp_path, "a1", 1, 0), record(tmp_path, "a2", 2, 0)]
    others = [
        record(tmp_path, "b1", 1, 1),
        record(tmp_path, "b2", 3, 0),
        record(tmp_path, "b3", 1, 0, SCOPE.replace("/n/", "/m/")),
    ]
    (tmp_path / "v1" / "event_sources" / "odd").write_text("{")
    assert not records.missing({(1, 0), (2, 0)})
    assert records.remove({(1, 0), (2, 0)}) == 2
    assert not any(path.exists() for pair in left for path in pair)
    assert all(path.exists() for pair in others for path in pair)
    assert records.missing({(1, 0)})
