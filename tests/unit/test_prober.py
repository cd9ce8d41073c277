"""The prober: what makes an engine healthy or not, and what the node's HTTP port says."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import zmq

from procs.prober import http
from procs.prober import judge as module
from procs.prober.canary import Canary
from procs.prober.metrics import Metrics
from procs.prober.routes import Routes
from shared.engine_client import EngineClient
from shared.errors import Code, NodeError, RequestError
from shared.frames import Beat, Death, EngineFacts
from shared.roles import canary, find
from tests.unit.test_relay import configure
from tests.unit.test_service import FACTS, INCARNATION, Bench, bench_at


class Scene:
    """A canary against a scripted engine."""

    def __init__(self, bench: Bench, directory: Path, **more: Any) -> None:
        self.bench = bench
        self.client = EngineClient(directory, "prober")
        self.said = 0
        config = configure(directory, **{"canary_wait": 0.05, "canary_timeout": 0.05, **more})
        self.canary = Canary(config, find(config.role), self.client, self._say)
        self.answered = 0
        self.running = asyncio.create_task(self.canary.run())

    def _say(self) -> None:
        self.said += 1

    def engine(self, steps: float = 0, incarnation: int = INCARNATION, state: str = "ready", **numbers: float) -> None:
        beat = Beat("engine", 1, state, "", 0.0, "", incarnation, 0, {"scheduler_steps_dp0": steps, **numbers})
        self.canary.hear_engine(beat)
        self.client.hear_beat(beat)

    async def next_canary(self) -> str:
        await self.bench.until(lambda: len(self.bench.backend.submitted) > self.answered)
        self.answered += 1
        return list(self.bench.backend.submitted)[self.answered - 1]

    async def answer(self) -> None:
        rid = await self.next_canary()
        self.bench.service.output(rid, [1], {"type": "length"}, None)

    async def verdict(self, healthy: bool) -> None:
        await self.bench.until(lambda: self.canary.verdict is not None and self.canary.verdict.healthy is healthy)

    async def close(self) -> None:
        self.running.cancel()
        await asyncio.wait([self.running])
        self.client.close()


def run(directory: Path, test: Callable[[Scene], Awaitable[None]], facts: EngineFacts = FACTS, **more: Any) -> None:
    async def main() -> None:
        async with bench_at(directory) as bench:
            bench.backend.facts = facts
            scene = Scene(bench, directory, **more)
            try:
                await test(scene)
            finally:
                await scene.close()

    asyncio.run(main())


@pytest.fixture(autouse=True)
def short_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_SECONDS", 0.5)


def test_healthy_by_the_first_canary_and_unhealthy_by_two_without_an_answer(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        scene.engine()
        await scene.answer()
        await scene.verdict(True)
        assert scene.said == 1 and scene.canary.verdict is not None and scene.canary.verdict.incarnation == INCARNATION
        await scene.next_canary()
        await scene.next_canary()
        await scene.verdict(False)
        assert scene.answered == 2 + 1 and scene.canary.verdict is not None and "no token within" in scene.canary.verdict.reason
        await scene.answer()
        await scene.verdict(True)
        assert scene.said == 3

    run(tmp_path, test)


def test_one_failure_is_forgiven(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        scene.engine()
        await scene.answer()
        for _ in range(3):
            await scene.next_canary()
            await scene.answer()
        assert scene.said == 1 and scene.canary.verdict is not None and scene.canary.verdict.healthy

    run(tmp_path, test)


def test_an_engine_that_works_is_not_judged_by_a_late_canary(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        scene.engine(steps=10)
        await scene.answer()
        await scene.verdict(True)
        rid = await scene.next_canary()
        for number in range(20):  # several times its time
            scene.engine(steps=10 + number)
            await asyncio.sleep(0.02)
        scene.bench.service.output(rid, [1], {"type": "length"}, None)
        await scene.next_canary()
        assert scene.said == 1 and rid not in scene.bench.backend.aborted

    run(tmp_path, test)


def test_each_dp_rank_has_its_canary_and_one_that_is_dead_is_the_engine_s(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        scene.engine()
        rids = {}
        for _ in range(2):
            rid = await scene.next_canary()
            rids[scene.bench.backend.submitted[rid]["routed_dp_rank"]] = rid
        scene.bench.service.output(rids[0], [1], {"type": "length"}, None)
        await scene.next_canary()  # the next one for rank 0
        assert scene.said == 0, "rank 1 has not answered"
        scene.bench.service.output(rids[1], [1], {"type": "length"}, None)
        await scene.verdict(True)
        for number in range(1000):
            scene.engine(steps=number)  # rank 0 works, so only rank 1 gets canaries
            await asyncio.sleep(0.01)
            if scene.canary.verdict is not None and not scene.canary.verdict.healthy:
                break
        assert scene.canary.verdict is not None and "DP rank 1" in scene.canary.verdict.reason, scene.canary.verdict

    facts = msgspec.structs.replace(FACTS, dp_size=2)
    run(tmp_path, test, facts=facts)


def test_an_operator_s_canary_keeps_what_the_role_needs(tmp_path: Path) -> None:
    facts = msgspec.structs.replace(FACTS, dp_size=2, fake_bootstrap_host="2.2.2.2", bootstrap_port=7)
    given = {"token_ids": [9], "stop_conditions": {"max_tokens": 3}}
    for name in ("aggregated", "prefill", "decode"):
        role = find(name)
        made = canary.payload(role, facts, given, 1)
        asked = canary.request(role, facts, given)
        assert made["input_ids"] == [9] and made["routed_dp_rank"] == 1
        assert ("_HEALTH_CHECK" in asked) == ("bootstrap_info" in asked) == (name != "aggregated")
        if name != "aggregated":
            assert (made["bootstrap_host"], made["bootstrap_room"]) == ("2.2.2.2", 1)
    assert canary.ranks(find("embedding"), facts) == [None], "SGLang lets no embedding choose its rank"
    with pytest.raises(RequestError, match="token_ids"):
        canary.payload(find("aggregated"), facts, {"prompt": "x"}, None)


def test_disabled_canaries_are_the_first_one_only_and_the_one_that_heals(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        scene.engine()
        await scene.answer()
        await scene.verdict(True)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await scene.next_canary()
        scene.engine(loop_lag=60)
        await scene.verdict(False)
        scene.engine()
        await scene.answer()
        await scene.verdict(True)

    run(tmp_path, test, canaries=False)


def test_what_is_stopped_is_unhealthy_at_once_and_asked_when_it_goes_on(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        scene.engine()
        await scene.answer()
        await scene.verdict(True)
        scene.canary.hear_stopped("scheduler (pid 7) is stopped by a signal or a debugger")
        await scene.verdict(False)
        assert scene.canary.verdict is not None and "pid 7" in scene.canary.verdict.reason
        scene.answered = len(scene.bench.backend.submitted)
        scene.canary.hear_stopped("")
        await scene.answer()
        await scene.verdict(True)

    run(tmp_path, test, canary_wait=3600.0)


def test_a_busy_engine_gets_no_canary(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        scene.engine()
        await scene.answer()
        await scene.verdict(True)
        for number in range(30):
            scene.engine(steps=number * 10)
            await asyncio.sleep(0.01)
        assert len(scene.bench.backend.submitted) == 1

    run(tmp_path, test, canary_wait=0.1)


def test_a_first_canary_that_fails_is_no_health_though_it_made_a_step(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        scene.engine()
        rid = await scene.next_canary()
        scene.engine(steps=1)
        scene.bench.service.failed(rid, Code.INTERNAL, "kernel is missing")
        await scene.verdict(False)
        assert scene.canary.verdict is not None and "kernel is missing" in scene.canary.verdict.reason

    run(tmp_path, test)


def test_a_new_engine_is_probed_at_once(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        scene.engine()
        await scene.answer()
        await scene.verdict(True)
        scene.client.hear_death(Death(INCARNATION, "scheduler", 1, "killed", 0.0))
        scene.bench.service._incarnation = INCARNATION + 1
        scene.engine(incarnation=INCARNATION + 1)
        await scene.answer()
        await scene.bench.until(lambda: scene.said == 2)
        assert scene.canary.verdict is not None and scene.canary.verdict.incarnation == INCARNATION + 1

    run(tmp_path, test, canary_wait=3600.0)


def test_a_paused_engine_gets_no_canary_and_one_at_once_when_it_goes_on(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        scene.engine()
        await scene.answer()
        await scene.verdict(True)
        for state in ("paused", "sleeping"):
            interrupted = await scene.next_canary()
            scene.engine(state=state)
            await scene.bench.until(lambda rid=interrupted: rid in scene.bench.backend.aborted)  # type: ignore[misc]
            with pytest.raises(TimeoutError):
                # Several times a canary's interval and its timeout.
                async with asyncio.timeout(0.3):
                    await scene.next_canary()
            assert scene.said == 1 and scene.canary.verdict is not None and scene.canary.verdict.healthy
            scene.engine()
            await scene.answer()

    run(tmp_path, test)


# --- HTTP ----------------------------------------------------------------------------------------------------------------


class Node:
    want = "serve"
    healthy = False
    judged = False
    failed_reason = ""
    endpoints = ["generate", "load_lora"]  # noqa: RUF012 - nothing changes it


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_what_the_port_says(tmp_path: Path) -> None:
    async def main() -> None:
        config = configure(tmp_path, system_port=free_port())
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        node, metrics = Node(), Metrics(context, config)
        client = EngineClient(tmp_path, "prober")
        routes = Routes(client, set, loras=False)
        runner = await http.start(config, node, metrics, routes)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{config.system_port}") as session:

            async def codes() -> list[int]:
                found = []
                for path in ("/live", "/health", "/ready"):
                    async with session.get(path) as answer:
                        found.append(answer.status)
                return found

            assert await codes() == [200, 503, 503]
            node.healthy = True
            assert await codes() == [200, 200, 200]
            async with session.get("/health") as answer:
                body = await answer.json(content_type=None)
            assert (body["status"], body["endpoints"]) == ("ready", {"generate": "ready", "load_lora": "ready"}) and set(
                body["uptime"]
            ) == {
                "secs",
                "nanos",
            }
            node.want = "drain"
            assert (await codes())[2] == 503
            node.failed_reason, node.healthy = "it crashed 5 times", False
            assert await codes() == [503, 503, 503]
            async with session.get("/metrics") as answer:
                assert answer.status == 503 and "relay" in await answer.text()
        with pytest.raises(NodeError, match=f"--system-port {config.system_port}"):
            await http.start(msgspec.structs.replace(config), node, metrics, routes)
        await runner.cleanup()
        client.close()
        metrics.close()
        context.term()

    asyncio.run(main())


def test_dynamo_s_paths_and_its_word_for_a_start(tmp_path: Path) -> None:
    async def main() -> None:
        more = {"health_path": "/healthz", "live_path": "/livez", "starting_status": "ready"}
        config = configure(tmp_path, system_port=free_port(), **more)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        node, metrics = Node(), Metrics(context, config)
        client = EngineClient(tmp_path, "prober")
        runner = await http.start(config, node, metrics, Routes(client, set, loras=False))
        async with aiohttp.ClientSession(f"http://127.0.0.1:{config.system_port}") as session:

            async def codes(*paths: str) -> list[int]:
                found = []
                for path in paths:
                    async with session.get(path) as answer:
                        found.append(answer.status)
                return found

            everything = ("/livez", "/live", "/healthz", "/health", "/ready")
            assert await codes(*everything) == [200, 200, 200, 200, 503]
            node.judged = True
            assert await codes(*everything) == [200, 200, 503, 503, 503]
        await runner.cleanup()
        client.close()
        metrics.close()
        context.term()

    asyncio.run(main())
