"""KV events of real engines at a real KV router: repeated prompts go where their blocks are, whoever died meanwhile."""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from shared.state import BEAT_SECONDS
from tests.e2e.conftest import MODEL
from tests.frontend import LOOPBACK, Frontend, free_port
from tests.harness import CPU, ONE_THREAD, SGNODE, Node, instances, model_cards, send, wait_for
from tests.kv_follower import Follower
from tests.kv_player import Dropper, Fold, Player
from tests.kv_router import KvRouter
from tests.streams import Streams

PAGE = 16
BLOCKS = 8
ROUNDS = 12
EVENTS = 10_000
DROPPED = 0.05
ELSEWHERE = "127.0.0.2"
"""SGLang binds the interface `lo`; as a name, in the second node's own /etc/hosts, it is this address: a Dropper's."""


def prompt(seed: int) -> list[int]:
    return random.Random(seed).choices(range(20, 250), k=PAGE * BLOCKS)


class Cluster:
    """Two nodes with one store, a frontend in KV mode, and a router to ask.

    ``nodes[0]`` has two agents. ``nodes[1]`` has a small cache, that evicts; its relay, and the ``incumbent``'s publisher in
    another cluster, hear SGLang through ``dropper``. ``fold``: what its engine holds.
    """

    def __init__(self, store: Path, model: Path) -> None:
        self.store = store
        self.nodes = []
        self.asked = 0
        live, replay = free_port(), f"tcp://127.0.0.1:{free_port()}"
        # As dynamo.sglang wants them, open to the network; and closed.
        opened = {"endpoint": f"tcp://*:{free_port()}", "replay_endpoint": f"tcp://*:{free_port()}"}
        closed = {"endpoint": f"tcp://lo:{live}", "replay_endpoint": replay, "bind": True, "buffer_steps": 1_000_000}
        small = ["--max-total-tokens", "4096", "--chunked-prefill-size", "512"]
        for agents, where, cache in ((2, opened, CPU), (1, closed, small)):
            flags = [str(model), "--served-model-name", MODEL, *cache, "--no-frontend", "--agents", str(agents)]
            flags += ["--page-size", str(PAGE), "--drain-grace", "0.5"]
            flags += ["--kv-events-config", json.dumps({"publisher": "zmq", "topic": "kv-events", **where})]
            self.nodes.append(Node(*flags, name=f"kv{agents}", env={"DYN_FILE_KV": str(store), **ONE_THREAD}))
        hosts = self.nodes[1].root / "hosts"
        hosts.write_text(f"127.0.0.1 localhost\n{ELSEWHERE} lo\n")
        alone = f'mount --bind {hosts} /etc/hosts && exec "$@"'
        self.nodes[1].program = ["unshare", "--mount", "--propagation", "private", "sh", "-c", alone, "sh", SGNODE]
        self.frontend = Frontend(store, env={"DYN_ROUTER_MODE": "kv"})
        self.router = KvRouter(store, PAGE)
        self.dropper = Dropper(f"tcp://127.0.0.1:{live}", f"tcp://{ELSEWHERE}:{live}")
        (other := store.parent / "incumbent").mkdir()
        self.incumbent = KvRouter(other, PAGE, incumbent=(f"tcp://{ELSEWHERE}:{live}", model))
        self.replay = replay
        self.fold = Fold(replay, PAGE)

    def workers(self, node: Node) -> set[int]:
        """Worker ids of a node's agents, as its coordinator tells them."""
        held = [json.loads(path.read_bytes()) for path in (node.runtime_dir / "registrations").glob("[!.]*")]
        listed = {int(path.name.rpartition("%2F")[2], 16) for path in instances(node, self.store)}
        return {each["worker_id"] for each in held if each["agent"].startswith("agent")} & listed

    def homes(self, tokens: list[int]) -> list[int]:
        """Numbers of the nodes whose every agent is believed to have the whole prompt; a part of it counts as a failure."""
        found = self.router.overlaps(tokens)
        assert set(found.values()) <= {BLOCKS}, found
        whole = {worker for worker, _ in found}
        return [number for number, node in enumerate(self.nodes) if (ids := self.workers(node)) and ids <= whole]

    def ask(self, *seeds: int) -> None:
        with Streams() as streams:
            for seed in seeds:
                streams.start(self.frontend.url, MODEL, 1, 4, prompt=prompt(seed))
            assert not [result for result in streams.join() if not result.complete], streams.results

    def metric(self, name: str) -> list[int]:
        """A metric's sum over each node's processes, by their last beats; the relay answers itself. -1: it has none of it."""
        texts = [requests.get(f"{node.system_url}/metrics", timeout=5).text for node in self.nodes]
        found = [re.findall(rf"^sgnode_{name}{{.*}} (.*)$", text, re.M) for text in texts]
        return [int(sum(map(float, values))) if values else -1 for values in found]

    def served(self) -> list[int]:
        """Requests that each node has taken in the lives of its agents."""
        return self.metric("streams_total")

    def split(self, seed: int) -> list[int]:
        """How a prompt's repetitions are shared out."""
        time.sleep(2 * BEAT_SECONDS)
        before = self.served()
        for _ in range(ROUNDS):
            self.ask(seed)
        wait_for("all are counted", lambda: sum(self.served()) - sum(before) == ROUNDS, 5)
        return [after - was for after, was in zip(self.served(), before, strict=True)]

    def logs(self) -> str:
        return "\n".join(node.logs() for node in self.nodes) + self.router.log.read_text()[-2000:]

    def fill(self, *lengths: int) -> None:
        """Prompts of these lengths that share beginnings, as those of conversations do."""
        with Streams() as streams:
            for length in lengths:
                self.asked += 1
                chance = random.Random(self.asked)
                tokens = prompt(1000 + chance.randrange(8))[: PAGE * chance.randrange(BLOCKS)]
                tokens += chance.choices(range(20, 250), k=length - len(tokens))
                streams.start(self.frontend.url, MODEL, 1, 1, prompt=tokens)
            assert not [result for result in streams.join() if not result.complete], streams.results

    def agree(self, seconds: float = 15.0) -> float:
        """Wait until the router believes of the second node's worker what its engine holds; how long that took."""
        (worker,) = self.workers(self.nodes[1])
        began = time.monotonic()
        try:
            wait_for("the same", lambda: self.router.believed().get(worker, {}) == self.fold.look(), seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.differ(self.router, worker)}, {self.logs()}") from error
        return round(time.monotonic() - began, 2)

    def differ(self, router: KvRouter, worker: int) -> tuple[int, int, int]:
        """Blocks that the engine has; that the router misses; that it has too many."""
        true, believed = self.fold.look(), router.believed().get(worker, {})
        return len(true), len(true.keys() - believed.keys()), len(believed.keys() - true.keys())

    def close(self) -> None:
        for router in (self.router, self.incumbent):
            router.close()
        self.dropper.close()
        self.frontend.close()
        for node in self.nodes:
            node.close()


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    store = tmp_path_factory.mktemp("kv") / "store"
    store.mkdir()
    made = Cluster(store, model)
    try:
        for node in made.nodes:
            node.start()
        for node in made.nodes:
            node.wait_ready(180)
        made.frontend.wait_model(MODEL)
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def home(cluster: Cluster) -> list[int]:
    """A prompt's seed for each node, that only this node has."""
    seeds = range(8)
    cluster.ask(*seeds)
    wait_for("the router knows all", lambda: all(len(cluster.homes(prompt(seed))) == 1 for seed in seeds), 10)
    found = {cluster.homes(prompt(seed))[0]: seed for seed in seeds}
    assert found.keys() == {0, 1}, "otherwise going home shows nothing"
    return [found[0], found[1]]


def test_repeated_prompts_go_where_their_blocks_are(cluster: Cluster, home: list[int]) -> None:
    assert cluster.split(home[0]) == [ROUNDS, 0]
    assert cluster.split(home[1]) == [0, ROUNDS]
    cards = [json.loads(path.read_bytes()) for path in (cluster.store / "v1" / "mdc").iterdir()]
    assert len(cards) == 3 and all("'kv_event_publishing_enabled': True" in str(card) for card in cards)
    assert all("'enable_local_indexer': True" in str(card) for card in cards), "a router asks it for what it has missed"


def test_two_agents_say_that_they_are_one_engine(cluster: Cluster) -> None:
    """As dynamo.sglang's gateway (gateway.py, register.py 1.6.1): otherwise they count as twice the capacity."""
    data = [card["card_json"]["runtime_config"].get("runtime_data") or {} for _, card in model_cards(cluster.store)]
    engines = [each.get("dynamo.sglang.gateway_engine") for each in data]
    assert sorted(engines.count(each) for each in engines) == [1, 2, 2] and None in engines, data
    assert sorted(str(each.get("dynamo.sglang.gateway_workers")) for each in data) == ["2", "2", "None"]


def test_killed_relays_publish_everything_again(cluster: Cluster, home: list[int], figures: Callable[..., None]) -> None:
    before = cluster.metric("kv_blocks")
    assert all(blocks >= BLOCKS for blocks in before)
    pids = [node.pid("relay") for node in cluster.nodes]
    began = time.monotonic()
    for pid in pids:
        send(pid, signal.SIGKILL)
    wait_for("new relays", lambda: all(node.pid("relay") not in (0, *pids) for node in cluster.nodes), 10)
    wait_for("the same blocks in the new relays", lambda: cluster.metric("kv_blocks") == before, 15, every=0.1)
    wait_for("their publishers", lambda: cluster.metric("kv_publishers") == [2, 1], 15, every=0.1)
    mirrored = time.monotonic() - began
    wait_for("the router knows again", lambda: [cluster.homes(prompt(seed)) for seed in home] == [[0], [1]], 15)
    known = time.monotonic() - began
    rss = cluster.nodes[0].process_row("relay")["rss_mb"]
    figures(mirrored_s=round(mirrored, 2), known_s=round(known, 2), rss_mb=rss)
    assert all("removed" in (node.runtime_dir / "log" / "relay.log").read_text() for node in cluster.nodes), "of the dead ones"
    assert cluster.metric("kv_event_frames_lost") == [0, 0]
    cluster.ask(20)
    wait_for("what is stored now is told too", lambda: len(cluster.homes(prompt(20))) == 1, 5)
    assert cluster.split(home[0]) == [ROUNDS, 0]
    assert cluster.split(home[1]) == [0, ROUNDS]


def test_a_new_agent_has_what_its_engine_has(cluster: Cluster, home: list[int]) -> None:
    node = cluster.nodes[0]
    old, pid = cluster.workers(node), node.pid("agent:1")
    send(pid, signal.SIGKILL)
    wait_for("another worker id", lambda: len(cluster.workers(node)) == 2 and cluster.workers(node) != old, 20)
    new = cluster.workers(node)
    wait_for("its blocks", lambda: {worker for worker, _ in cluster.router.overlaps(prompt(home[0]))} == new, 15)
    wait_for("the dead agent's publisher is closed", lambda: cluster.metric("kv_publishers") == [2, 1], 10, every=0.1)


def test_a_drained_node_that_resumes_has_its_blocks_again(cluster: Cluster, figures: Callable[..., None]) -> None:
    node = cluster.nodes[0]
    workers = cluster.workers(node)
    cluster.ask(*range(8))
    before = {worker: cluster.router.believed()[worker] for worker in workers}
    assert node.sgnode("drain").returncode == 0
    wait_for("out of discovery", lambda: not cluster.workers(node), 10)
    assert node.sgnode("resume").returncode == 0
    wait_for("registered", lambda: cluster.workers(node) == workers, 10)
    began = time.monotonic()
    wait_for("its blocks", lambda: {worker: cluster.router.believed().get(worker) for worker in workers} == before, 10)
    figures(known_s=round(time.monotonic() - began, 2))


def test_an_engine_s_blocks_die_with_it(cluster: Cluster, home: list[int], figures: Callable[..., None]) -> None:
    node = cluster.nodes[0]
    incarnation = node.status()["incarnation"]
    began = time.monotonic()
    send(node.pid("engine"), signal.SIGKILL)
    wait_for("nobody has its blocks", lambda: cluster.router.overlaps(prompt(home[0])) == {}, 5, every=0.005)
    figures(forgotten_ms=round((time.monotonic() - began) * 1e3))
    assert cluster.homes(prompt(home[1])) == [1]
    wait_for("the next engine", lambda: node.status()["incarnation"] > incarnation, 30)
    node.wait_ready(120)
    for seed in range(8):
        assert 0 not in cluster.homes(prompt(seed)), "stale"
    assert cluster.metric("kv_blocks")[0] == 0
    cluster.ask(home[0])
    wait_for("it has a home again", lambda: len(cluster.homes(prompt(home[0]))) == 1, 5)


def test_a_router_believes_what_the_engine_holds_whatever_got_lost(cluster: Cluster, figures: Callable[..., None]) -> None:
    node, dropper = cluster.nodes[1], cluster.dropper
    cluster.nodes[0].sgnode("drain")
    cluster.agree()
    dropper.share, seen = DROPPED, dropper.seen
    began = time.monotonic()
    while cluster.fold.events < EVENTS:
        cluster.fill(*[PAGE * BLOCKS] * 200)
        cluster.fold.look()
    figures(events=cluster.fold.events, frames=cluster.fold.frames, load_s=round(time.monotonic() - began, 1))
    converged = cluster.agree()
    assert dropper.dropped > (dropper.seen - seen) * DROPPED / 2 > 10
    assert cluster.metric("kv_event_frames_lost")[1] == 0 and cluster.metric("kv_event_gaps")[1] > dropper.dropped / 4
    figures(after="drops", dropped_frames=dropper.dropped, converged_s=converged, blocks=len(cluster.fold.look()))
    (incumbent,) = cluster.incumbent.believed()
    blocks, missing, stale = cluster.differ(cluster.incumbent, incumbent)
    figures(incumbent="KvEventPublisher(zmq_endpoint=…)", blocks=blocks, missing=missing, stale=stale)
    assert missing or stale, "otherwise nothing was lost"

    began, pid = time.monotonic(), node.pid("relay")
    send(pid, signal.SIGKILL)
    cluster.fill(*[PAGE * 20] * 20)  # told to nobody
    wait_for("another relay", lambda: node.pid("relay") not in (0, pid), 10)
    cluster.agree(30)
    figures(after="relay SIGKILL", converged_s=round(time.monotonic() - began, 2))

    incarnation, (worker,) = node.status()["incarnation"], cluster.workers(node)
    began = time.monotonic()
    send(node.pid("engine"), signal.SIGKILL)
    wait_for("nobody has its blocks", lambda: not cluster.router.believed().get(worker), 10, every=0.005)
    forgotten = time.monotonic() - began
    wait_for("the next engine", lambda: node.status()["incarnation"] > incarnation, 30)
    node.wait_ready(120)
    cluster.fold = Fold(cluster.replay, PAGE)
    began = time.monotonic()
    cluster.fill(*[PAGE * 20] * 20)
    assert cluster.fold.look()
    cluster.agree()
    figures(after="engine SIGKILL", forgotten_s=round(forgotten, 3), converged_s=round(time.monotonic() - began, 2))


# --- a follower: SGLang 0.5.23 can't run DP attention on a CPU, so its socket and the coordinator's beats are played ---


def test_a_follower_publishes_its_dp_rank_under_the_leader_s_worker(model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    environ = {**os.environ, **LOOPBACK, "DYN_FILE_KV": str(store), "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "tests.dp_worker", str(model), MODEL, str(PAGE)]
    with (tmp_path / "worker.log").open("wb") as log:
        leader = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert leader.stdout is not None
        asyncio.run(_follow(int(leader.stdout.readline()), store, tmp_path / "f"))
    finally:
        leader.kill()
        leader.wait(5)


async def _follow(worker: int, store: Path, directory: Path) -> None:
    tokens = prompt(1)
    event = {"type": "BlockStored", "block_hashes": list(range(1, BLOCKS + 1)), "parent_block_hash": None}
    with Player() as player, KvRouter(store, PAGE) as router:
        player.say({**event, "token_ids": tokens, "block_size": PAGE, "lora_id": None, "medium": "GPU"})
        follower = Follower(directory, store, PAGE)

        async def known(wanted: dict[tuple[int, int], int]) -> None:
            try:
                await asyncio.to_thread(wait_for, str(wanted), lambda: router.overlaps(tokens) == wanted, 15)
            except AssertionError as error:
                raise AssertionError(f"{error}: {router.overlaps(tokens)}\n{follower.log.read_text()[-3000:]}") from error

        try:
            for heart in follower.hearts:
                heart.start()
            follower.say(player, {worker})
            await known({(worker, 1): BLOCKS})
            player.say({"type": "BlockRemoved", "block_hashes": [BLOCKS], "medium": "GPU"})
            await known({(worker, 1): BLOCKS - 1})
            follower.kill()
            player.say({"type": "BlockRemoved", "block_hashes": [BLOCKS - 1], "medium": "GPU"})
            follower.start()
            await known({(worker, 1): BLOCKS - 2})
            follower.say(player, set())
            await known({})
        finally:
            follower.close()
