"""A scrape: what its sources say, within a second whatever hangs, and what is left out then."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from procs.prober.metrics import SCRAPE_SECONDS
from procs.relay.aside import Aside
from procs.relay.gpu_metrics import GpuMetrics
from procs.relay.process_metrics import Processes
from procs.relay.scrape import Scraper
from procs.relay.text import Labels, expose, labelled
from shared.gpus import Gpus
from shared.state import Board
from tests.harness import send, wait_for
from tests.unit.test_gpu import Library
from tests.unit.test_relay import Scene, agent_server, beat, configure, run

WRITER = """
import sys
from prometheus_client import Counter, Gauge, Histogram
labels = ["engine", "model_name"]
mode = sys.argv[1]
counter = Counter("sglang:requests", "Requests.", labels)
counter.labels("e", "own").inc(2)
Gauge("sglang:running", "Running.", labels, multiprocess_mode=mode).labels("e", "own").set(7)
Gauge("sglang:usage", "Usage.", labels, multiprocess_mode="mostrecent").labels("e", "own").set(0.5)
Histogram("sglang:ttft", "Seconds.", labels, buckets=[1]).labels("e", "own").observe(0.1)
Counter("other", "Not SGLang's.").inc()
print("written", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes that write metrics as SGLang's do, in incarnation 1."""
    directory = tmp_path / "tmp" / "1" / "metrics" / "sub"
    directory.mkdir(parents=True)
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(directory)}
    command = [sys.executable, "-c", WRITER, "livesum"]
    made = [subprocess.Popen(command, env=environ, stdin=-1, stdout=-1, text=True) for _ in range(2)]
    for process in made:
        assert process.stdout is not None and process.stdout.readline() == "written\n"
    yield made
    for process in made:
        process.kill()
        process.communicate()


def samples(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """By the sample's name; parsing is Prometheus's own."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def scrape_once(scraper: Scraper) -> tuple[str, float]:
    async def main() -> tuple[str, float]:
        began = time.monotonic()
        text = await scraper.text({})
        return text, time.monotonic() - began

    return asyncio.run(main())


def test_sglangs_metrics_appear_once_with_the_labels_of_the_first_agent(
    tmp_path: Path, writers: list[subprocess.Popen[str]]
) -> None:
    board = Board()
    board.hear(beat("engine"))
    board.hear(beat("agent:1", info={"worker_id": "99", "metrics_url": "http://127.0.0.1:1/"}))
    scraper = Scraper(configure(tmp_path, agents=2, enable_metrics=True), board)
    assert "worker_id" not in str(samples(scrape_once(scraper)[0])["sglang:running"]), "none is known yet"
    board.hear(beat("agent:0", info={"worker_id": "255", "metrics_url": "http://127.0.0.1:1/"}))
    found = samples(scrape_once(scraper)[0])
    labels = {
        "engine": "e",
        "model_name": "own",
        "model": "m",
        "dynamo_namespace": "dynamo",
        "dynamo_component": "backend",
        "dynamo_endpoint": "generate",
        "worker_id": "ff",
    }
    assert found["sglang:requests_total"] == [(labels, 4.0)] and found["sglang:ttft_count"] == [(labels, 2.0)]
    assert found["sglang:running"] == [(labels, 14.0)] and "other_total" not in found
    board.hear(beat("agent:0", info={}))  # its next life has no identity yet
    assert samples(scrape_once(scraper)[0])["sglang:requests_total"][0][0]["worker_id"] == "ff"


def test_a_dead_process_keeps_its_counts_and_loses_its_live_gauges(tmp_path: Path, writers: list[subprocess.Popen[str]]) -> None:
    board = Board()
    board.hear(beat("engine"))
    scraper = Scraper(configure(tmp_path, enable_metrics=True), board)
    dead = writers[0]
    send(dead.pid, signal.SIGKILL)
    dead.communicate()
    found = samples(scrape_once(scraper)[0])
    assert found["sglang:requests_total"][0][1] == 4.0 and found["sglang:running"][0][1] == 7.0
    left = {path.name for path in tmp_path.rglob(f"*_{dead.pid}.db")}
    assert left == {f"{kind}_{dead.pid}.db" for kind in ("counter", "histogram", "gauge_mostrecent")}


def test_without_enable_metrics_the_nodes_own_remain(tmp_path: Path, writers: list[subprocess.Popen[str]]) -> None:
    board = Board()
    board.hear(beat("engine"))
    text, _ = scrape_once(Scraper(configure(tmp_path), board))
    assert not re.search("^sglang:", text, re.M) and 'sgnode_process_state{process="engine",state="ready"} 1.0' in text


def test_a_follower_shows_the_leaders_worker(tmp_path: Path, writers: list[subprocess.Popen[str]]) -> None:
    board = Board()
    board.hear(beat("engine"))
    board.hear(beat("coordinator", info={"workers": "4096,255", "node": "ready"}))
    text, _ = scrape_once(Scraper(configure(tmp_path, enable_metrics=True, node_rank=1, nnodes=2), board))
    found = samples(text)
    assert found["sglang:requests_total"][0][0]["worker_id"] == "1000"
    assert [labels["state"] for labels, value in found["sgnode_node_state"] if value] == ["ready"]


def test_a_scrape_ends_within_a_second_whatever_hangs(tmp_path: Path) -> None:
    """A counter file that can't be read (a FIFO), an agent that doesn't answer, one whose address is nonsense, no supervisord."""
    directory = tmp_path / "tmp" / "1" / "metrics"
    directory.mkdir(parents=True)
    fifo = directory / "counter_1.db"
    os.mkfifo(fifo)

    async def never() -> str:
        await asyncio.sleep(60)
        return ""

    async def test(scene: Scene) -> None:
        server, url = await agent_server(never)
        scene.hear(beat("engine"))
        scene.hear(beat("agent:0", info={"metrics_url": url, "worker_id": "1"}))
        scene.hear(beat("agent:1", info={"metrics_url": "nonsense", "worker_id": "x"}))
        for _ in range(2):
            asked = time.monotonic()
            found = samples(await scene.metrics.text())
            assert time.monotonic() - asked < SCRAPE_SECONDS and found["sgnode_process_state"]
            success = {labels["collector"]: value for labels, value in found["sgnode_scrape_collector_success"]}
            expected = {"engine": 0, "agent:0": 0, "agent:1": 0, "supervisord": 0, "processes": 1, "gpus": 1}
            assert success == expected
        assert [thread.name for thread in threading.enumerate()].count("engine") == 1, "a reading that hangs is not begun twice"
        os.close(os.open(fifo, os.O_WRONLY))  # an empty file, to the reader that hangs
        fifo.unlink()

        async with asyncio.timeout(5):
            while ({"collector": "engine"}, 1.0) not in samples(await scene.metrics.text())["sgnode_scrape_collector_success"]:
                pass
        await server.cleanup()

    run(tmp_path, test, agents=2, enable_metrics=True)


def test_many_scrapes_at_once_are_one(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        asked: list[Any] = []
        original = scene.relay._scrape_asked
        scene.relay._metrics._on_message = lambda parts: (asked.append(parts), original(parts))
        texts = await asyncio.gather(*(scene.metrics.text() for _ in range(50)))
        assert len(set(texts)) == 1 and len(asked) == 1
        await scene.metrics.text()
        assert len(asked) == 2

    run(tmp_path, test)


def test_what_is_read_aside_is_waited_for_once_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        answers: list[Any] = [ValueError("broken"), ValueError("broken"), 5]

        def read() -> int:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return int(answer)

        aside = Aside("it", read)
        assert [await aside.get() for _ in range(3)] == [None, None, 5]

    asyncio.run(main())
    assert [record.message for record in caplog.records] == ["metrics of it: broken", "metrics of it: they are read again"]


def test_what_comes_too_late_is_not_the_next_answer() -> None:
    gate, answers = threading.Event(), iter([1, 2])

    def read() -> int:
        answer = next(answers)
        gate.wait(10)
        return answer

    async def main() -> None:
        aside = Aside("it", read)
        assert await aside.get(0.01) is None and await aside.get(0.01) is None
        late = aside._reading
        gate.set()
        assert late is not None and await late == 1
        assert await aside.get() == 2

    asyncio.run(main())


def test_processes_by_name_and_the_engines_children_by_title() -> None:
    title = "import sys, subprocess; subprocess.Popen(['sgnode::child', '-c', 'input()'], executable=sys.executable); input()"
    engine = subprocess.Popen([sys.executable, "-c", title], stdin=-1)
    try:
        processes = Processes()
        pids = {"relay": os.getpid(), "engine": engine.pid, "gone": 2**22 + 1, "none": 0}

        def both() -> dict[str, list[tuple[dict[str, str], float]]] | None:
            processes._look_at = 0.0
            found = samples(expose(processes.families(pids)))
            return found if len(found["sgnode_process_resident_memory_bytes"]) == 3 else None

        found = wait_for("the child", both, 10)
        for name, values in found.items():
            by_name = {labels["process"]: value for labels, value in values}
            assert by_name.keys() == {"relay", "engine", "sgnode::child"}, name
            assert all(value >= 0 if name.startswith("sgnode_process_cpu") else value > 0 for value in by_name.values())
        assert found["sgnode_process_open_fds"][0][1] >= 3
        assert abs(found["sgnode_process_start_time_seconds"][1][1] - time.time()) < 60
    finally:
        engine.kill()
        engine.communicate()
    remaining = samples(expose(processes.families(pids)))["sgnode_process_cpu_seconds_total"]
    assert [labels["process"] for labels, _ in remaining if labels["process"] != "sgnode::child"] == ["relay"]


def test_only_the_nodes_gpus_and_nothing_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    found = samples(expose(GpuMetrics(configure(tmp_path), lambda: Gpus(Library())).families()))
    first = {"gpu": "2", "uuid": "GPU-22ab-cd"}
    assert found["sgnode_gpu_memory_used_bytes"] == [(first, 3.0 * 2**30)], "GPU 1 says nothing"
    assert found["sgnode_gpu_memory_total_bytes"] == [(first, 80.0 * 2**30)]
    assert found["sgnode_gpu_utilization_ratio"] == [(first, 0.37)] and found["sgnode_gpu_power_watts"] == [(first, 350.5)]
    assert found["sgnode_gpu_temperature_celsius"] == [(first, 51.0)]
    second = GpuMetrics(configure(tmp_path, gpu_ids=[1, 2]), lambda: Gpus(Library()))
    assert second.families() == [], "the second visible one is broken, the third isn't there"
    tries: list[int] = []
    without = GpuMetrics(configure(tmp_path), lambda: tries.append(1))  # type: ignore[func-returns-value,arg-type]
    assert without.families() == without.families() == [] and len(tries) == 1


def test_a_relay_with_a_driver_that_hangs_ends_at_once(tmp_path: Path) -> None:
    """Its threads must not hold the process: SIGTERM, with a reading under way."""
    program = (
        "import asyncio, threading\n"
        "from procs.relay.aside import Aside\n"
        "async def main(): print(await Aside('gpus', threading.Event().wait).get(0.05))\n"
        "asyncio.run(main())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=10, check=True)
    assert done.stdout == "None\n" and "gpus: no answer within" in done.stderr


@pytest.mark.parametrize("line", ["x 2", 'x{le="1"} 2', 'x{a="mo}de"} 2 1700000', 'x{model="own"} 2', "x{} 2", ""])
def test_labels_are_added_alike_each_time(line: str) -> None:
    labels = Labels({"model": 'a"b', "le": "9"})
    assert labels.add(line) == labels.add(line) == labelled(line, labels.labels)
