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

from procs.prober import canary as module
from procs.prober import http
from procs.prober.canary import OWN_STEPS, Canary
from procs.prober.metrics import Metrics
from procs.prober.routes import Routes
from shared.engine_client import EngineClient
from shared.errors import Code, NodeError
from shared.frames import Beat, Death
from shared.roles import find
from tests.unit.test_relay import configure
from tests.unit.test_service import INCARNATION, Bench, bench_at


class Scene:
    """A canary against a scripted engine."""

    def __init__(self, bench: Bench, directory: Path, **more: Any) -> None:
        self.bench = bench
        self.client = EngineClient(directory, "prober")
        self.said = 0
        config = configure(directory, **{"canary_wait": 0.05, "canary_timeout": 0.05, **more})
        self.canary = Canary(config, find("aggregated"), self.client, self._say)
        self.answered = 0
        self.running = asyncio.create_task(self.canary.run())

    def _say(self) -> None:
        self.said += 1

    def engine(self, steps: float = 0, incarnation: int = INCARNATION) -> None:
        beat = Beat("engine", 1, "ready", "", 0.0, "", incarnation, 0, {"steps": steps})
        self.canary.engine = beat
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


def run(directory: Path, test: Callable[[Scene], Awaitable[None]], **more: Any) -> None:
    async def main() -> None:
        async with bench_at(directory) as bench:
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
        assert scene.answered == 2 + 1 and "no token within" in scene.canary.verdict.reason
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
        for number in range(1, 6):
            await scene.next_canary()
            scene.engine(steps=10 + number * (OWN_STEPS + 1))
        assert scene.said == 1

    run(tmp_path, test)


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
        def engine(state: str) -> None:
            beat = Beat("engine", 1, state, "", 0.0, "", INCARNATION, 0, {"steps": 0.0})
            scene.canary.hear_engine(beat)
            scene.client.hear_beat(beat)

        engine("ready")
        await scene.answer()
        await scene.verdict(True)
        for state in ("paused", "sleeping"):
            interrupted = await scene.next_canary()
            engine(state)
            await scene.bench.until(lambda rid=interrupted: rid in scene.bench.backend.aborted)  # type: ignore[misc]
            with pytest.raises(TimeoutError):
                # Several times a canary's interval and its timeout.
                async with asyncio.timeout(0.3):
                    await scene.next_canary()
            assert scene.said == 1 and scene.canary.verdict is not None and scene.canary.verdict.healthy
            engine("ready")
            await scene.answer()

    run(tmp_path, test)


# --- HTTP ----------------------------------------------------------------------------------------------------------------


class Node:
    want = "serve"
    healthy = False
    failed_reason = ""


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
            assert (body["status"], body["endpoints"]) == ("ready", {"generate": "ready"}) and set(body["uptime"]) == {
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
