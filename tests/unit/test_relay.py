"""The relay: one valid exposition from several sources, an answer within a second whatever hangs, KV use by life."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from procs.prober.metrics import Metrics
from procs.relay import node_metrics
from procs.relay.relay import Relay
from procs.relay.text import labelled, merge
from shared.config import NodeConfig
from shared.frames import Beat, Death, KvUse
from shared.sockets import encode
from shared.state import Board

AGENT_TEXT = '# HELP up Seconds.\n# TYPE up gauge\nup 1\n# HELP dyn_x Some.\n# TYPE dyn_x counter\ndyn_x{worker_id="own"} 2\n'


def configure(directory: Path, **more: Any) -> NodeConfig:
    (directory / "sock").mkdir(exist_ok=True)
    return NodeConfig(
        name="t", runtime_dir=str(directory), version="0", role="aggregated", model_path="/m", served_model_name="m", **more
    )


def beat(process: str, numbers: dict[str, float] | None = None, info: dict[str, str] | None = None) -> Beat:
    return Beat(process, 1, "ready", "", 0.0, "", 1, 0, numbers or {}, info or {})


def test_a_family_that_several_have_appears_once_with_all_its_samples() -> None:
    histogram = '# HELP h Help.\n# TYPE h histogram\nh_bucket{le="1"} 1\nh_sum 2\nh_count 3\n# EOF\n'
    text = merge([histogram, AGENT_TEXT, histogram.replace("h_sum 2", 'h_sum{w="b"} 4')])
    assert text.count("# HELP h ") == text.count("# TYPE h ") == 1
    names = [line.partition("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert names == ["h_bucket", "h_sum", "h_count"] * 2 + ["up", "dyn_x"] and "# EOF" not in text
    assert merge(["", "\n"]) == ""


def test_labels_are_added_where_absent_and_the_sources_own_win() -> None:
    labels = {"model": 'a"b', "le": "9"}
    assert labelled('x{le="1"} 2', labels) == 'x{le="1",model="a\\"b"} 2'
    assert labelled("x 2", {"model": "m"}) == 'x{model="m"} 2'
    assert labelled('x{a="mode=\\"model=\\""} 2', {"model": "m"}) == 'x{a="mode=\\"model=\\"",model="m"} 2'


def test_a_beat_with_odd_numbers_spoils_nothing(tmp_path: Path) -> None:
    board = Board()
    board.hear(beat("relay", {"kv_blocks_dp0": 3, "kv_blocks_dp11": 4, "kv_blocks": 9, "kv_blocks_dp": 1}))
    board.hear(beat("engine", {"steps": 5, "no-name": 1, "": 2, "incarnation": 3, "Großbuchstabe": 1}))
    text = node_metrics.render(configure(tmp_path), board, {0: KvUse(1, 0, 2, 8, 0, 0.25, 0.0)})
    assert 'sgnode_steps{process="engine"} 5.0' in text and 'sgnode_kv_used_blocks{dp_rank="0"} 2.0' in text
    assert 'sgnode_process_state{process="engine",state="ready"} 1.0' in text
    assert 'sgnode_kv_blocks{dp_rank="0",process="relay"} 3.0' in text
    assert 'sgnode_kv_blocks{dp_rank="11",process="relay"} 4.0' in text
    assert list(text_string_to_metric_families(text))


def test_the_document_has_every_name() -> None:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    missing = [name for name in node_metrics.HELP if f"`sgnode_{name}`" not in text]
    assert not missing, f"docs/metrics.md has no row of {missing}"


class Scene:
    def __init__(self, directory: Path, config: NodeConfig) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.relay = Relay(config)
        self.running = asyncio.create_task(self.relay.run())
        self.metrics = Metrics(self.context, config)

    def hear(self, frame: Beat | Death | KvUse) -> None:
        self.relay._hear([encode(frame)])

    async def scrape(self) -> str:
        async with asyncio.timeout(5):
            while True:
                try:
                    return await self.metrics.text()
                except TimeoutError:  # not connected yet
                    await asyncio.sleep(0.01)

    async def close(self) -> None:
        self.metrics.close()
        self.context.term()
        self.running.cancel()
        await asyncio.wait([self.running])


def run(directory: Path, test: Callable[[Scene], Awaitable[None]], **more: Any) -> None:
    async def main() -> None:
        scene = Scene(directory, configure(directory, **more))
        try:
            await scene.scrape()
            await test(scene)
        finally:
            await scene.close()

    asyncio.run(main())


async def agent_server(answer: Callable[[], Awaitable[str]]) -> tuple[web.AppRunner, str]:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(text=await answer())

    app = web.Application()
    app.add_routes([web.get("/metrics", handler)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}/metrics"


def test_two_agents_report_two_series(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        async def answer() -> str:
            return AGENT_TEXT

        server, url = await agent_server(answer)
        for number, name in enumerate(("agent:0", "agent:1")):
            scene.hear(beat(name, info={"metrics_url": url, "worker_id": str(255 + number)}))
        text = await scene.scrape()
        await server.cleanup()
        assert 'up{worker_id="ff"} 1' in text and 'up{worker_id="100"} 1' in text and 'dyn_x{worker_id="own"} 2' in text
        assert text.count("# TYPE up ") == 1

    run(tmp_path, test, agents=2)


def test_kv_use_is_handed_on_repeated_and_gone_with_its_engine(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        use = KvUse(1, 0, 3, 10, 0, 0.3, 0.0)
        scene.hear(use)
        scene.hear(msgspec.structs.replace(use, dp_rank=1))
        assert [each.dp_rank for each in scene.relay._heart.repeat()] == [0, 1]  # type: ignore[attr-defined]
        assert "sgnode_kv_used_blocks" in await scene.scrape()
        scene.hear(msgspec.structs.replace(use, incarnation=2))
        assert len(scene.relay._heart.repeat()) == 1
        scene.hear(Death(1, "scheduler", 1, "killed", 0.0))
        assert len(scene.relay._heart.repeat()) == 1, "an old death takes nothing of the new engine"
        scene.hear(Death(2, "scheduler", 1, "killed", 0.0))
        assert scene.relay._heart.repeat() == []
        scene.relay._hear([b"\xc1nonsense"])
        assert scene.relay._states.dropped == 1

    run(tmp_path, test)


def test_its_last_word_is_that_it_has_stopped(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        scene.running.cancel()
        await asyncio.wait([scene.running])
        assert scene.relay._heart.state == "stopped"

    run(tmp_path, test)
