"""The node's own metrics, ``sgnode_*``, from the processes' beats and the node's status."""

import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from procs.relay.text import expose
from shared.config import NodeConfig
from shared.frames import KvUse
from shared.state import LOST, Board, State

STATES = (*State, LOST)
KEY = re.compile(r"([a-z][a-z0-9_]*?)(?:_dp([0-9]+))?")
"""A beat's number; at its end the DP rank that it is about, if it is about one."""
TAKEN = ("process_state", "node_state", "build", "incarnation", "epoch", "kv_used_blocks", "kv_total_blocks")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


VERSIONS = {"sglang": _version("sglang"), "dynamo": _version("ai-dynamo")}
"""Installed when this process started; without importing them."""


def families(config: NodeConfig, board: Board, use: dict[int, KvUse], document: Mapping[str, Any] | None = None) -> list[Metric]:
    """Label ``process`` as in `sgnode status`; counts are of a process's present life.

    ``document``: the node's status as supervisord has it, None while it doesn't answer.
    """
    info = InfoMetricFamily("sgnode_build", "Versions and role of the node, in labels")
    info.add_metric([], {"version": config.version, "role": config.role, "node_rank": str(config.node_rank), **VERSIONS})
    return [info, *_states(config, board), *_counted(config, board), *_kv_use(use), *_told(document or {})]


def render(config: NodeConfig, board: Board, use: dict[int, KvUse], document: Mapping[str, Any] | None = None) -> str:
    """Prometheus text of ``families``."""
    return expose(families(config, board, use, document))


def _states(config: NodeConfig, board: Board) -> list[Metric]:
    node = GaugeMetricFamily("sgnode_node_state", "1 for the state the node is in, 0 for the others", labels=["state"])
    coordinator = board.beat("coordinator")
    whole = coordinator.info.get("node", State.STARTING) if coordinator is not None else board.state("coordinator")
    state = GaugeMetricFamily(
        "sgnode_process_state", "1 for the state a process is in, 0 for the others", labels=["process", "state"]
    )
    for each in STATES:
        node.add_metric([each], float(each == whole))
    for name in config.processes:
        now = board.state(name)
        for each in STATES:
            state.add_metric([name, each], float(each == now))
    keeper = board.beat("keeper")
    lives = GaugeMetricFamily("sgnode_incarnation", "Life of the engine, counted from the node's start")
    lives.add_metric([], keeper.incarnation if keeper else 0)
    epoch = GaugeMetricFamily("sgnode_epoch", "Start of the group of nodes that the engine belongs to; 0 without a group")
    epoch.add_metric([], keeper.epoch if keeper else 0)
    return [node, state, lives, epoch]


def _counted(config: NodeConfig, board: Board) -> list[Metric]:
    """What the beats say in numbers."""
    found: dict[str, tuple[list[str], Metric]] = {}
    for name in config.processes:
        beat = board.beat(name)
        for key, value in (beat.numbers if beat else {}).items():
            match = KEY.fullmatch(key)
            if match is None or match[1] in TAKEN:
                continue  # a beat of a newer version must not spoil the scrape
            labels = {"process": name} | ({} if match[2] is None else {"dp_rank": match[2]})
            if match[1] not in found:
                kind = CounterMetricFamily if match[1].endswith("_total") else GaugeMetricFamily
                family = kind(f"sgnode_{match[1]}", HELP.get(match[1], match[1]), labels=list(labels))
                found[match[1]] = list(labels), family
            names, family = found[match[1]]
            if names == list(labels):  # not the same name with and without a rank
                family.add_metric(list(labels.values()), value)
    return [family for _, family in found.values()]


def _kv_use(use: dict[int, KvUse]) -> list[Metric]:
    used = GaugeMetricFamily("sgnode_kv_used_blocks", "KV blocks in use", labels=["dp_rank"])
    total = GaugeMetricFamily("sgnode_kv_total_blocks", "KV blocks there are", labels=["dp_rank"])
    for rank, each in use.items():
        used.add_metric([str(rank)], each.used_blocks)
        total.add_metric([str(rank)], each.total_blocks)
    return [used, total] if use else []


def _told(document: Mapping[str, Any]) -> list[Metric]:
    """What supervisord and the coordinator know of deaths."""
    found: list[Metric] = []
    restarts = CounterMetricFamily(
        "sgnode_process_restarts_total", "Starts of a process by supervisord after its first", labels=["process"]
    )
    for row in document.get("processes", []):
        if row["name"] != "engine" and row.get("restarts") is not None:  # the engine's are its keeper's
            restarts.add_metric([row["name"]], row["restarts"])
    if restarts.samples:
        found.append(restarts)
    if "logs" in document:
        logs = "1 while a log file can't be written, mostly for want of room"
        found.append(GaugeMetricFamily("sgnode_log_trouble", logs, value=float(bool(document["logs"]))))
    if "deaths" in document:
        deaths = "Deaths of the engine since its last good life; five in ten minutes are a crash loop"
        found.append(GaugeMetricFamily("sgnode_engine_deaths", deaths, value=len(document["deaths"])))
    if crash := document.get("last_crash"):
        last = "When the engine last died, in UNIX seconds"
        found.append(GaugeMetricFamily("sgnode_engine_last_death_timestamp_seconds", last, value=crash["at"]))
    return found


HELP = {
    "inflight": "Requests running",
    "streams_total": "Requests taken in this process's life",
    "ttft_p50_seconds": "Median time to the first token of the last 15 s",
    "ttft_p99_seconds": "99th percentile of the time to the first token of the last 15 s",
    "ttft_samples": "Requests that sgnode_ttft_p50_seconds is made of",
    "itl_p50_seconds": "Median time from token to token of the last 15 s",
    "itl_p99_seconds": "99th percentile of the time from token to token of the last 15 s",
    "itl_samples": "Tokens that sgnode_itl_p50_seconds is made of",
    "load_seconds": "What the engine took to load",
    "drain_left_seconds": "Seconds that a drain's streams still have; 0 without a drain",
    "registered": "1 while this agent is in discovery",
    "steps": "Step frames sent by the engine",
    "outputs": "Outputs that came out of the engine",
    "controls": "Engine controls that run",
    "loop_lag": "Seconds for which the engine's event loop has not turned",
    "scheduler_steps": "Forward passes begun by the scheduler",
    "scheduler_outputs": "Batches of tokens that the scheduler has handed out",
    "scheduler_loops": "Turns of the scheduler's loop",
    "scheduler_busy": "1 while the scheduler has a batch or requests",
    "scheduler_step_seconds": "Age of the scheduler's present step, 0 between steps",
    "scheduler_transfers": "Requests that wait for a KV transfer",
    "scheduler_to_detokenizer": "Batches of tokens that the scheduler has given SGLang's detokenizer",
    "scheduler_sampled_at": "When the scheduler's counters were read, in seconds of the machine's monotonic clock",
    "from_detokenizer": "Batches that SGLang's detokenizer has given back",
    "nixl_read_bytes": "Bytes that NIXL has read from other processes",
    "nixl_registered": "Pieces of memory that NIXL reads into, or lets others read",
    "nixl_late": "Transfers over NIXL that are past their deadline and have not ended",
    "nixl_late_bytes": "Memory that is kept for them",
    "generations_total": "Generations of images and videos that have ended",
    "generation_seconds_total": "Seconds that generations of images and videos took, encoding included",
    "running": "Requests in the scheduler's running batch",
    "waiting": "Requests in the scheduler's queue",
    "tokens": "Tokens handed to peers by the engine",
    "peers": "Agents and probers connected to the engine",
    "dropped_frames": "Frames that did not decode",
    "kv_event_frames": "Frames of KV events taken from SGLang",
    "kv_event_gaps": "Holes in the sequence of SGLang's frames",
    "kv_event_frames_replayed": "Frames of KV events that came by a replay alone; after a relay's start all before it",
    "kv_event_frames_lost": "Frames of KV events that nobody has any more",
    "kv_events": "KV events taken from SGLang",
    "kv_events_cleared": "AllBlocksCleared among the KV events",
    "kv_events_dropped": "KV events and frames of them that did not decode",
    "kv_blocks": "KV blocks that the engine holds, as its events say",
    "kv_blocks_unvouched": "KV blocks withdrawn since events were lost, until an event proves them",
    "kv_blocks_unplaced": "KV blocks that could not be taken: their parent is not known, or their size is another",
    "kv_publishers": "Workers and DP ranks that KV events are published for",
}
