"""The node's own metrics, ``sgnode_*``, from the processes' beats."""

import re

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from shared.config import NodeConfig
from shared.frames import KvUse
from shared.state import LOST, Board, State

STATES = (*State, LOST)
KEY = re.compile(r"([a-z][a-z0-9_]*?)(?:_dp([0-9]+))?")
"""A beat's number; at its end the DP rank that it is about, if it is about one."""
TAKEN = ("process_state", "incarnation", "epoch", "kv_used_blocks", "kv_total_blocks")


def render(config: NodeConfig, board: Board, use: dict[int, KvUse]) -> str:
    """Prometheus text. Label ``process`` as in `sgnode status`; counts are of a process's present life."""
    registry = CollectorRegistry()
    state = Gauge(
        "sgnode_process_state", "1 for the state a process is in, 0 for the others", ["process", "state"], registry=registry
    )
    incarnation = Gauge("sgnode_incarnation", "Life of the engine, counted from the node's start", registry=registry)
    epoch = Gauge("sgnode_epoch", "Start of the group of nodes that the engine belongs to; 0 without a group", registry=registry)
    gauges: dict[tuple[str, ...], Gauge] = {}
    for name in config.processes:
        now = board.state(name)
        for each in STATES:
            state.labels(name, each).set(float(each == now))
        beat = board.beat(name)
        for key, value in (beat.numbers if beat else {}).items():
            match = KEY.fullmatch(key)
            if match is None or match[1] in TAKEN:
                continue  # a beat of a newer version must not spoil the scrape
            labels = {"process": name} | ({} if match[2] is None else {"dp_rank": match[2]})
            metric = (match[1], *labels)
            if metric not in gauges:
                if any(each[0] == match[1] for each in gauges):
                    continue  # the same name with and without a rank
                gauges[metric] = Gauge(f"sgnode_{match[1]}", HELP.get(match[1], match[1]), list(labels), registry=registry)
            gauges[metric].labels(**labels).set(value)
    keeper = board.beat("keeper")
    incarnation.set(keeper.incarnation if keeper else 0)
    epoch.set(keeper.epoch if keeper else 0)
    if use:
        used = Gauge("sgnode_kv_used_blocks", "KV blocks in use", ["dp_rank"], registry=registry)
        total = Gauge("sgnode_kv_total_blocks", "KV blocks there are", ["dp_rank"], registry=registry)
        for rank, each_use in use.items():
            used.labels(str(rank)).set(each_use.used_blocks)
            total.labels(str(rank)).set(each_use.total_blocks)
    return str(generate_latest(registry), "utf-8")


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
    "registered": "1 while this agent is in discovery",
    "steps": "Step frames sent by the engine",
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
