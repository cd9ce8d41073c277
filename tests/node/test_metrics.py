"""/metrics of a node with two agents: the incumbent's names, the node's own, an answer within a second whatever is stopped."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests.harness import Node, send, wait_for
from tests.node.conftest import MODEL
from tests.unit.test_scrape import samples

AGENTS = ("agent:0", "agent:1")
INCUMBENT = {
    "dynamo_component_total_blocks",
    "dynamo_component_gpu_cache_usage_percent",
    "dynamo_component_model_load_time_seconds",
    "dynamo_component_inflight_requests",
    "dynamo_component_request_bytes_total",
    "dynamo_component_response_bytes_total",
    "dynamo_component_request_duration_seconds_count",
    "dynamo_component_requests_total",
    "dynamo_component_cancellation_total",
    "dynamo_component_uptime_seconds",
    "dynamo_rejection_request_total",
    "dynamo_engine_request",
    "dynamo_request_queue",
}
"""What a `python -m dynamo.sglang` worker has without --enable-metrics and with --engine-request-limit (anchors §13)."""
ABSENT = {
    "dynamo_component_errors_total": "made at the first error",
    "dynamo_component_kv_publisher_engines_dropped_events_total": "sgnode_kv_event_frames_lost: the relay reads SGLang's events",
    "dynamo_component_kv_publisher_zmq_events_total": "sgnode_kv_events, likewise",
    "dynamo_component_cleanup_time_seconds": "of Dynamo's unified workers only; dynamo.sglang 1.6.1 hasn't it either",
    "dynamo_component_drain_time_seconds": "likewise; sgnode_drain_left_seconds",
    "dynamo_component_kvstats_active_blocks": "a name of old documentation",
}
OWN = {
    "sgnode_build_info", "sgnode_node_state", "sgnode_process_state", "sgnode_incarnation", "sgnode_epoch", "sgnode_inflight",
    "sgnode_steps", "sgnode_tokens", "sgnode_peers", "sgnode_registered", "sgnode_streams_total", "sgnode_drain_left_seconds",
    "sgnode_load_seconds", "sgnode_dropped_frames", "sgnode_kv_used_blocks", "sgnode_kv_total_blocks", "sgnode_engine_deaths",
    "sgnode_process_restarts_total", "sgnode_process_resident_memory_bytes", "sgnode_process_cpu_seconds_total",
    "sgnode_process_open_fds", "sgnode_process_start_time_seconds", "sgnode_scrape_collector_success",
    "sgnode_scrape_collector_duration_seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def node(model: Path) -> Iterator[Node]:
    arguments = ("--synthetic", "step_seconds=0.01", "--agents", "2", "--engine-request-limit", "64", "--drain-grace", "0")
    with Node(str(model), "--served-model-name", MODEL, *arguments) as node:
        node.start().wait_ready(40)
        yield node


@pytest.fixture(autouse=True)
def ready(node: Node) -> None:
    node.wait_ready(20)


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    try:
        for pid in pids:
            send(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            send(pid, signal.SIGCONT)


def scrape(url: str) -> tuple[requests.Response, float]:
    """The answer and seconds; one connection each, as curl's."""
    began = time.monotonic()
    answer = requests.get(f"{url}/metrics", timeout=5)
    return answer, time.monotonic() - began


def success(text: str) -> dict[str, float]:
    return {labels["collector"]: value for labels, value in samples(text)["sgnode_scrape_collector_success"]}


def test_the_incumbents_names_and_the_nodes_own(node: Node) -> None:
    def used_both() -> bool:
        body = {"model": MODEL, "prompt": "one", "max_tokens": 2}
        assert requests.post(f"{node.url}/v1/completions", json=body, timeout=10).status_code == 200
        counted = samples(scrape(node.system_url)[0].text)["dynamo_component_requests_total"]
        return sum(value > 0 for labels, value in counted if labels["dynamo_endpoint"] == "generate") == 2

    wait_for("a request through each agent", used_both, 20)
    answer, _ = scrape(node.system_url)
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = samples(answer.text)
    missing = (INCUMBENT | OWN) - found.keys()
    assert not missing and not ABSENT.keys() & found.keys()
    workers = {labels["worker_id"] for labels, _ in found["dynamo_component_uptime_seconds"]}
    assert {f"{int(node.process_row(name)['detail'].split()[-1]):x}" for name in AGENTS} == workers
    for name in INCUMBENT:
        assert all(labels["worker_id"] in workers for labels, _ in found[name]), name
    # One engine: a sum over workers is its own capacity, whichever label it is grouped by.
    (total,) = found["dynamo_component_total_blocks"]
    (usage,) = found["dynamo_component_gpu_cache_usage_percent"]
    (load,) = found["dynamo_component_model_load_time_seconds"]
    assert total[1] == 4096 and total[0]["dp_rank"] == usage[0]["dp_rank"] == "0" and 0 < load[1] < 10
    assert total[0]["model"] == MODEL and total[0]["dynamo_component"] == "backend"


def test_every_process_has_its_resources_and_a_restart_is_counted(node: Node) -> None:
    names = {row["name"] for row in node.status()["processes"]} | {"supervisord", "sgnode::child0", "sgnode::child1"}
    old = node.pid("prober")
    send(old, signal.SIGKILL)
    wait_for("another prober", lambda: node.pid("prober") not in (0, old) and node.status()["state"] == "ready", 20)
    found = wait_for("the new one's", lambda: _restarted(node), 10)
    for name in ("resident_memory_bytes", "cpu_seconds_total", "open_fds", "start_time_seconds"):
        assert {labels["process"] for labels, _ in found[f"sgnode_process_{name}"]} == names, name
    assert [labels["state"] for labels, value in found["sgnode_node_state"] if value] == ["ready"]


def _restarted(node: Node) -> dict[str, list[tuple[dict[str, str], float]]] | None:
    try:
        found = samples(scrape(node.system_url)[0].text)
    except requests.ConnectionError:  # its port isn't open yet
        return None
    prober = [value for labels, value in found["sgnode_process_open_fds"] if labels["process"] == "prober"]
    restarts = dict((labels["process"], value) for labels, value in found["sgnode_process_restarts_total"])
    return found if prober and restarts["prober"] == 1 and restarts["relay"] == 0 else None


@pytest.mark.parametrize("who", ["agents", "supervisord", "engine"])
def test_a_scrape_ends_within_a_second_whatever_is_stopped(node: Node, who: str) -> None:
    url, supervisord = node.system_url, node.status()["supervisord_pid"]
    pids = {"agents": [node.pid(name) for name in AGENTS], "supervisord": [supervisord], "engine": [node.pid("engine")]}[who]
    missing = {"agents": set(AGENTS), "supervisord": {"supervisord"}, "engine": set()}[who]
    with stopped(*pids):
        for _ in range(3):
            answer, seconds = scrape(url)
            assert answer.status_code == 200 and seconds < 1.0
            assert {name for name, fine in success(answer.text).items() if not fine} == missing
            assert 'sgnode_process_resident_memory_bytes{process="engine"}' in answer.text
    wait_for("all of it again", lambda: all(success(scrape(url)[0].text).values()), 10)


def test_a_stopped_relay_is_503_within_a_second(node: Node) -> None:
    url = node.system_url
    with stopped(node.pid("relay")):
        for _ in range(2):
            answer, seconds = scrape(url)
            assert (answer.status_code, answer.text) == (503, "the relay does not answer") and seconds < 1.0
    wait_for("it again", lambda: scrape(url)[0].status_code == 200, 10)


def test_a_drain_is_seen(node: Node) -> None:
    assert node.sgnode("drain").returncode == 0
    try:
        found = samples(scrape(node.system_url)[0].text)
        assert [labels["state"] for labels, value in found["sgnode_node_state"] if value] == ["drained"]
        assert {labels["process"]: value for labels, value in found["sgnode_registered"]} == dict.fromkeys(AGENTS, 0.0)
    finally:
        assert node.sgnode("resume").returncode == 0
