"""An agent's decisions over real sockets: when it registers and withdraws, what a drain, a stop and a sick discovery do.

Dynamo's side is a fake identity; the real one is covered by the tests on process trees.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from procs.agent import agent as module
from procs.agent.agent import Agent
from procs.agent.reach import endpoints
from procs.agent.store import CARDS, INSTANCES, FileStore
from shared import config as configuration
from shared.config import Dynamo, NodeConfig
from shared.frames import Death, Frame, Intent, KvUse, Serving, Verdict, Welcome
from shared.heart import Heart
from shared.state import State
from tests.unit.test_service import INCARNATION, Bench, bench_at


class Discovery:
    """Stands for procs.agent.identity.Identity: remembers, and fails or hangs as told."""

    worker_id = "7"
    metrics_url = "http://127.0.0.1:1/metrics"
    made: "Discovery"

    def __init__(self, *_: Any) -> None:
        Discovery.made = self
        self.calls: list[str] = []
        self.load: list[KvUse] = []
        self.failures = 0
        self.hangs = False
        self.expired = False
        self.adapters: list[str] = []
        self.followed: list[Serving] = []
        self.controls: dict[str, Any] = {}
        self.trouble = ""
        self.ended = ""
        self.on_end: Callable[[], None] = lambda: None

    async def _call(self, what: str) -> None:
        self.calls.append(what)
        if self.hangs:
            await asyncio.Event().wait()
        if self.failures:
            self.failures -= 1
            raise ConnectionError("discovery is away")

    async def register(self, welcome: Welcome) -> None:
        await self._call(f"register {welcome.incarnation}")

    async def withdraw(self) -> None:
        await self._call("withdraw")

    def follows(self, serving: Serving) -> bool:
        return self.adapters == sorted(serving.adapters) and serving.taints is None

    async def follow(self, serving: Serving) -> None:
        await self._call(f"follow {sorted(serving.adapters)}")
        self.followed.append(serving)
        self.adapters = sorted(serving.adapters)

    async def publish(self, adapter: str, number: int) -> None:
        await self._call(f"publish {adapter} {number}")
        self.adapters = sorted({*self.adapters, adapter})

    async def revoke(self, adapter: str) -> None:
        await self._call(f"revoke {adapter}")
        self.adapters = sorted({*self.adapters} - {adapter})

    def lost(self) -> bool:
        was, self.expired = self.expired, False
        return was

    def store_trouble(self) -> str:
        return self.trouble

    def publish_load(self, use: KvUse) -> None:
        self.load.append(use)

    async def close(self) -> None:
        self.calls.append("close")


class Node:
    """The processes around one agent."""

    def __init__(self, bench: Bench, directory: Path) -> None:
        self.bench = bench
        self.hearts = {name: Heart(directory, name) for name in ("keeper", "prober", "coordinator", "relay")}
        for name, heart in self.hearts.items():
            heart.repeat = lambda name=name: self.repeated.get(name, [])  # type: ignore[misc]
            heart.start()
        bench.heart.start()
        self.repeated: dict[str, list[Frame]] = {"coordinator": [Intent("serve", 0.0, "")]}
        self.agent = Agent(configuration.load(directory), 0)
        self.running = asyncio.create_task(self.agent.run())

    @property
    def discovery(self) -> Discovery:
        return Discovery.made

    def say(self, who: str, *frames: Frame) -> None:
        self.repeated[who] = list(frames)
        self.hearts[who].say()

    async def registered(self) -> None:
        self.bench.heart.set(State.READY)
        self.say("prober", Verdict(INCARNATION, True, ""))
        await self.until_state(State.READY)

    async def until_state(self, state: State) -> None:
        await self.bench.until(lambda: self.agent._heart.state == state)

    async def close(self) -> None:
        self.running.cancel()
        await asyncio.wait([self.running])
        for heart in self.hearts.values():
            heart.close()


def run(directory: Path, monkeypatch: pytest.MonkeyPatch, test: Callable[[Node], Awaitable[None]], **changes: Any) -> None:
    monkeypatch.setattr(module, "Identity", Discovery)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(module, "TICK_SECONDS", 0.05)
    base = NodeConfig(
        name="t",
        runtime_dir=str(directory),
        version="0",
        role="aggregated",
        model_path="/m",
        served_model_name="m",
        drain_grace=0.2,
    )
    configuration.save(msgspec.structs.replace(base, **changes))

    async def main() -> None:
        async with bench_at(directory) as bench:
            node = Node(bench, directory)
            try:
                await asyncio.sleep(0)
                await test(node)
            finally:
                await node.close()

    asyncio.run(main())


def test_it_registers_only_when_engine_canary_and_intent_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(node: Node) -> None:
        node.say("coordinator", Intent("drain", 0.0, ""))
        node.bench.heart.set(State.LOADING)
        await node.bench.until(lambda: node.agent._draining)
        node.bench.heart.set(State.READY)
        node.say("prober", Verdict(INCARNATION - 1, True, ""))
        await node.bench.until(lambda: node.agent._client.welcome is not None)
        node.say("coordinator", Intent("serve", 0.0, ""))
        await node.bench.until(lambda: node.agent._heart.beat.waiting_for == "the first canary")
        assert node.discovery.calls == []
        node.say("prober", Verdict(INCARNATION, True, ""))
        await node.until_state(State.READY)
        assert node.discovery.calls == [f"register {INCARNATION}"]
        node.say("prober", Verdict(INCARNATION, False, "a canary failed"))
        await node.until_state(State.WAITING)
        assert node.discovery.calls[1:] == ["withdraw"]

    run(tmp_path, monkeypatch, test)


def test_death_withdraws_within_200_ms_and_the_next_engine_registers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(node: Node) -> None:
        await node.registered()
        died = time.monotonic()
        node.say("keeper", Death(INCARNATION, "scheduler", 1, "killed", 0.0))
        await node.bench.until(lambda: "withdraw" in node.discovery.calls)
        assert time.monotonic() - died < 0.2
        node.bench.service._incarnation = INCARNATION + 1
        node.bench.heart.set(State.READY, incarnation=INCARNATION + 1)
        node.say("prober", Verdict(INCARNATION + 1, True, ""))
        await node.until_state(State.READY)
        assert node.discovery.calls[-1] == f"register {INCARNATION + 1}"

    run(tmp_path, monkeypatch, test)


def test_the_engine_s_adapters_are_followed_and_those_of_an_older_engine_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(node: Node) -> None:
        node.bench.service.serving(Serving(INCARNATION - 1, adapters={"old": 1}))
        await node.registered()
        node.bench.service.serving(Serving(INCARNATION, adapters={"a": 7}))
        await node.bench.until(lambda: node.agent._heart.beat.info.get("adapters") == "a")
        node.discovery.failures = 1
        node.bench.service.serving(Serving(INCARNATION))
        await node.bench.until(lambda: node.agent._heart.beat.info.get("adapters") == "")
        assert node.discovery.calls[1:] == ["follow ['a']", "follow []", "follow []"], "what discovery refuses is tried again"

    run(tmp_path, monkeypatch, test)


def test_an_adapter_s_card_waits_for_the_engine_s_own_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(node: Node) -> None:
        await node.registered()
        publishing = asyncio.create_task(node.agent._publish_adapter("a", 7))
        await node.bench.until(lambda: node.agent._serving is not None)
        assert not any(call.startswith("publish") for call in node.discovery.calls)
        node.bench.service.serving(Serving(INCARNATION, adapters={"a": 7}))
        await publishing
        assert node.discovery.calls[-1] in ("publish a 7", "follow ['a']") and node.discovery.adapters == ["a"]
        revoking = asyncio.create_task(node.agent._revoke_adapter("a"))
        node.bench.service.serving(Serving(INCARNATION))
        await revoking
        assert node.discovery.adapters == []

    run(tmp_path, monkeypatch, test)


def test_a_paused_engine_is_withdrawn_and_comes_back_when_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(node: Node) -> None:
        await node.registered()
        for serving in (Serving(INCARNATION, paused=True), Serving(INCARNATION, paused=True, asleep=True)):
            node.bench.service.serving(serving)
            await node.until_state(State.WAITING)
            assert node.discovery.calls[-1] == "withdraw"
            node.bench.service.serving(Serving(INCARNATION))
            await node.until_state(State.READY)

    run(tmp_path, monkeypatch, test)


def test_an_engine_that_says_it_stops_is_withdrawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(node: Node) -> None:
        await node.registered()
        node.bench.heart.set(State.STOPPED)
        await node.bench.until(lambda: "withdraw" in node.discovery.calls)

    run(tmp_path, monkeypatch, test)


def test_drain_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(node: Node) -> None:
        await node.registered()
        node.say("coordinator", Intent("drain", 0.0, ""))
        await node.until_state(State.DRAINING)
        assert node.discovery.calls[-1] == "withdraw" and not node.agent._refusing, "the grace still serves"
        await node.until_state(State.DRAINED)
        assert node.agent._refusing and not node.running.done()
        node.say("coordinator", Intent("serve", 0.0, ""))
        await node.until_state(State.READY)
        assert not node.agent._refusing and node.discovery.calls[-1].startswith("register")

    run(tmp_path, monkeypatch, test)


def test_a_stop_that_waits_for_nothing_is_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(node: Node) -> None:
        await node.bench.until(lambda: node.agent._heart.beat.waiting_for.startswith("the engine"))
        asked = time.monotonic()
        node.agent._ask_stop()
        await asyncio.wait_for(node.running, 2)
        assert time.monotonic() - asked < 0.5 and node.discovery.calls == ["close"]

    run(tmp_path, monkeypatch, test, drain_grace=60.0)


def test_a_second_stop_skips_grace_and_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(node: Node) -> None:
        await node.registered()
        node.agent._ask_stop()
        await node.until_state(State.DRAINING)
        node.agent._ask_stop()
        await asyncio.wait_for(node.running, 2)

    run(tmp_path, monkeypatch, test, drain_grace=60.0)


def test_what_discovery_refuses_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(node: Node) -> None:
        node.discovery.failures = 2
        await node.registered()
        assert node.discovery.calls == [f"register {INCARNATION}"] * 3
        node.discovery.failures = 2
        node.say("prober", Verdict(INCARNATION, False, "sick"))
        await node.bench.until(lambda: node.discovery.calls.count("withdraw") == 3)
        assert not node.agent._listed

    run(tmp_path, monkeypatch, test)


def test_what_others_expired_is_registered_again_and_an_unwritable_store_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(node: Node) -> None:
        await node.registered()
        node.discovery.expired = True
        await node.bench.until(lambda: node.discovery.calls == [f"register {INCARNATION}"] * 2)
        node.discovery.trouble = "the file store can't be written"
        await node.bench.until(lambda: node.agent._heart.beat.detail == "worker 7; the file store can't be written")
        assert node.agent._registered and node.agent._heart.beat.state == State.READY

    run(tmp_path, monkeypatch, test)


def test_an_agents_own_records_are_told_from_others(tmp_path: Path) -> None:
    store = FileStore(tmp_path, "gen_erate", 0xABC)
    assert store.trouble() == "" and not store.has(INSTANCES)
    for kind in (INSTANCES, CARDS):
        (tmp_path / "v1" / kind).mkdir(parents=True)
    (tmp_path / "v1" / INSTANCES / "a%2Fb%2Fgen%5Ferate%2Fabc").touch()
    (tmp_path / "v1" / CARDS / "a%2Fb%2Fgen%5Ferate%2F1abc").touch()
    assert store.has(INSTANCES) and not store.has(CARDS) and store.trouble() == ""


def test_a_discovery_that_hangs_does_not_hold_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(node: Node) -> None:
        node.discovery.hangs = True
        node.bench.heart.set(State.READY)
        node.say("prober", Verdict(INCARNATION, True, ""))
        await node.bench.until(lambda: node.discovery.calls == [f"register {INCARNATION}"])
        node.agent._ask_stop()
        await asyncio.wait_for(node.running, 2)

    run(tmp_path, monkeypatch, test)


def test_a_withdrawal_that_hangs_holds_a_drain_for_its_own_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WITHDRAW_SECONDS", 0.2)

    async def test(node: Node) -> None:
        await node.registered()
        node.discovery.hangs = True
        node.agent._ask_stop()
        await asyncio.wait_for(node.running, 2)

    run(tmp_path, monkeypatch, test)


def test_a_hurried_drain_ends_at_once_and_the_next_one_is_patient_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(node: Node) -> None:
        await node.registered()
        node.say("coordinator", Intent("drain", 0.0, ""))
        await node.until_state(State.DRAINING)
        node.say("coordinator", Intent("drain", 0.0, "", True))
        await node.until_state(State.DRAINED)
        node.say("coordinator", Intent("serve", 0.0, ""))
        await node.until_state(State.READY)
        node.say("coordinator", Intent("drain", 0.0, ""))
        await node.until_state(State.DRAINING)

    run(tmp_path, monkeypatch, test, drain_grace=60.0)


def test_nobody_registers_before_the_coordinator_has_said_what_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(node: Node) -> None:
        node.repeated["coordinator"] = []
        node.bench.heart.set(State.READY)
        node.say("prober", Verdict(INCARNATION, True, ""))
        await node.bench.until(lambda: node.agent._verdict is not None and node.agent._client.welcome is not None)
        await node.bench.until(lambda: node.agent._heart.beat.waiting_for == "the coordinator")
        assert node.discovery.calls == []
        node.say("coordinator", Intent("serve", 0.0, ""))
        await node.until_state(State.READY)

    run(tmp_path, monkeypatch, test)


def test_a_runtime_that_ends_ends_the_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(node: Node) -> None:
        await node.registered()
        node.discovery.ended = "lease lost"
        node.discovery.on_end()
        with pytest.raises(RuntimeError, match="lease lost"):
            await asyncio.wait_for(node.running, 2)

    run(tmp_path, monkeypatch, test)


def test_load_is_published_for_the_present_engine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(node: Node) -> None:
        await node.registered()
        use = KvUse(INCARNATION, 0, 3, 10, 0, 0.3, 0.0)
        node.say("relay", msgspec.structs.replace(use, incarnation=INCARNATION - 1), use)
        await node.bench.until(lambda: bool(node.discovery.load))
        assert set(u.incarnation for u in node.discovery.load) == {INCARNATION}

    run(tmp_path, monkeypatch, test)


def test_an_agent_of_a_follower_refuses_to_run(tmp_path: Path) -> None:
    configuration.save(
        NodeConfig(
            name="t", runtime_dir=str(tmp_path), version="0", role="aggregated", model_path="/m", served_model_name="m",
            nnodes=2, node_rank=1,
        )
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "procs.agent", "0"], env={"SGNODE_RUNTIME_DIR": str(tmp_path), "PATH": ""},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "node_rank 0" in done.stderr


def test_etcd_away_is_said_and_holds_no_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETCD_ENDPOINTS", "http://127.0.0.1:1")

    async def test(node: Node) -> None:
        await node.bench.until(lambda: node.agent._heart.beat.waiting_for == "etcd at 127.0.0.1:1")
        node.agent._ask_stop()
        await asyncio.wait_for(node.running, 0.5)

    run(tmp_path, monkeypatch, test, dynamo=Dynamo(discovery_backend="etcd"))


def test_etcd_endpoints_in_every_spelling() -> None:
    assert endpoints({}) == [("localhost", 2379)]
    assert endpoints({"ETCD_ENDPOINTS": "https://a:1, b:2,c"}) == [("a", 1), ("b", 2), ("c", 2379)]
