"""The Grafana dashboard: what an operator asks, top to bottom. `python -m monitoring.dashboard` writes grafana/sgnode.json."""

import itertools
from collections.abc import Callable

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, VariableRefresh, VariableSort

from monitoring import DASHBOARD
from monitoring.panel import BAD, GOOD, SO_SO, SOURCE, Panel, lines, number, quantiles, states

NODE = 'instance=~"$node"'
"""The node's own metrics and SGLang's: one scrape is one node."""
AGENT = f'{NODE},process=~"agent:.*"'
WORKER = f'{NODE},dynamo_namespace=~"$namespace",worker_id=~"$worker"'
"""Dynamo's metrics in the agents."""
ENGINE = f'{NODE},dynamo_namespace=~"$namespace",model_name=~"$model"'
FRONTEND = 'model=~"$model"'
BETWEEN = "waiting|starting|loading|warming|draining|drained|paused|sleeping"
WRONG = "unhealthy|failed|stopped|lost"


def _up() -> list[Panel]:
    def of(metric: str, by: str, words: str) -> str:
        return f'(max by ({by}) ({metric}{{{NODE},state=~"{words}"}}) == 1)'

    node, process = ("sgnode_node_state", "instance, state"), ("sgnode_process_state", "instance, process, state")
    return [
        states(
            "State of each node",
            "Green: ready. Orange: on its way, drained, paused or asleep. Red: failed, unhealthy, stopped or lost.",
            (f"2 * {of(*node, 'ready')}", "{{instance}} {{state}}"),
            (of(*node, BETWEEN), "{{instance}} {{state}}"),
            (f"0 * {of(*node, WRONG)}", "{{instance}} {{state}}"),
        ),
        states(
            "Processes that are not ready",
            "Empty when all is well. Red: lost, failed, unhealthy or stopped; `sgnode status` says why.",
            (of(*process, BETWEEN), "{{instance}} {{process}} {{state}}"),
            (f"0 * {of(*process, WRONG)}", "{{instance}} {{process}} {{state}}"),
        ),
        number(
            "Scraped",
            "0: Prometheus can't reach the node's /metrics.",
            (f'up{{{NODE},job="sgnode"}}', "{{instance}}"),
            steps=((None, BAD), (1, GOOD)),
        ),
        number(
            "Agents in discovery",
            "0: no frontend sends requests here.",
            (f"sum by (instance) (sgnode_registered{{{NODE}}})", "{{instance}}"),
            steps=((None, BAD), (1, GOOD)),
        ),
        number(
            "Deaths of the engine",
            "Since its last good life. Five in ten minutes: the node is failed.",
            (f"sgnode_engine_deaths{{{NODE}}}", "{{instance}}"),
            steps=((None, GOOD), (1, SO_SO), (4, BAD)),
        ),
        number(
            "Restarts of processes",
            "In the dashboard's range; the engine's lives beside them.",
            (f"sum by (instance) (increase(sgnode_process_restarts_total{{{NODE}}}[$__range]))", "{{instance}}"),
            (f"changes(sgnode_incarnation{{{NODE}}}[$__range])", "{{instance}} engine"),
            steps=((None, GOOD), (1, SO_SO)),
        ),
        number(
            "Sources that don't answer",
            "Metrics that are missing from a scrape: an agent, SGLang's files, supervisord, the GPU's driver.",
            (
                f"sum by (instance) (1 - sgnode_scrape_collector_success{{{NODE}}})",
                "{{instance}}",
            ),
            steps=((None, GOOD), (1, SO_SO)),
        ),
        number(
            "Versions",
            "",
            (f"sgnode_build_info{{{NODE}}}", "{{version}}, SGLang {{sglang}}, Dynamo {{dynamo}}"),
            names=True,
        ),
    ]


def _slow() -> list[Panel]:
    ttft, itl = (
        f'sgnode_{name}_seconds_bucket{{{NODE},worker_id=~"$worker",model=~"$model"}}'
        for name in ("time_to_first_token", "inter_token_latency")
    )
    return [
        lines(
            "Time to first token",
            "From a request's arrival at the agent. The frontend's own is below.",
            *quantiles(ttft),
            unit="s",
        ),
        lines("Time from token to token", "At the agent.", *quantiles(itl), unit="s"),
        lines(
            "Tokens a second",
            "Handed on by the engine.",
            (f"sum by (instance) (rate(sgnode_tokens{{{NODE}}}[$__rate_interval]))", "{{instance}}"),
        ),
        lines(
            "Requests a second",
            "Taken by the agents.",
            (f"sum by (instance) (rate(sgnode_streams_total{{{AGENT}}}[$__rate_interval]))", "{{instance}}"),
            unit="reqps",
        ),
        lines(
            "Errors a second",
            "By type, as Dynamo's runtime in the agents counts them.",
            (
                f"sum by (instance, error_type) (rate(dynamo_component_errors_total{{{WORKER}}}[$__rate_interval]))",
                "{{instance}} {{error_type}}",
            ),
            unit="reqps",
        ),
        lines(
            "Cancelled and rejected a second",
            "The client went away; an agent's queue was full (--engine-request-limit).",
            (
                f"sum by (instance) (rate(dynamo_component_cancellation_total{{{WORKER}}}[$__rate_interval]))",
                "{{instance}} cancelled",
            ),
            (f"sum by (instance) (rate(dynamo_rejection_request_total{{{NODE}}}[$__rate_interval]))", "{{instance}} rejected"),
            unit="reqps",
        ),
    ]


def _waiting() -> list[Panel]:
    used, total = (f"sgnode_kv_{name}_blocks{{{NODE}}}" for name in ("used", "total"))
    return [
        lines(
            "Requests in flight",
            "At each agent, and in the agents' queues (--engine-request-limit).",
            (f"sgnode_inflight{{{AGENT}}}", "{{instance}} {{process}}"),
            (f"sum by (instance) (dynamo_request_queue{{{NODE}}})", "{{instance}} queued"),
            stacked=True,
        ),
        lines(
            "In the scheduler, by DP rank",
            "Running, and waiting for room.",
            (f"sgnode_running{{{NODE}}}", "{{instance}} running {{dp_rank}}"),
            (f"sgnode_waiting{{{NODE}}}", "{{instance}} waiting {{dp_rank}}"),
        ),
        lines(
            "Seconds in the present step",
            "Of each DP rank: a long prefill, or a scheduler that stands still. Event loop: since when it has not turned.",
            (f"sgnode_scheduler_step_seconds{{{NODE}}}", "{{instance}} {{dp_rank}}"),
            (f"sgnode_loop_lag{{{NODE}}}", "{{instance}} event loop"),
            unit="s",
        ),
        lines(
            "Scheduler steps a second",
            "Of each DP rank: 0 under load is a stall.",
            (f"rate(sgnode_scheduler_steps{{{NODE}}}[$__rate_interval])", "{{instance}} {{dp_rank}}"),
        ),
        lines(
            "KV cache in use, by DP rank",
            "1 is full: requests wait or are retracted.",
            (f"{used} / {total}", "{{instance}} {{dp_rank}}"),
            unit="percentunit",
            top=1,
        ),
        lines(
            "Drain: time left",
            "Until streams that still run are ended.",
            (f"max by (instance) (sgnode_drain_left_seconds{{{AGENT}}})", "{{instance}}"),
            unit="s",
        ),
    ]


def _router() -> list[Panel]:
    def of(name: str) -> str:
        return f"sgnode_{name}{{{NODE}}}"

    return [
        lines(
            "KV events lost",
            "Gaps are repaired by a replay. Frames lost: nobody has them any more; blocks are withdrawn until events prove them.",
            (f"increase({of('kv_event_frames_lost')}[$__rate_interval])", "{{instance}} {{dp_rank}} frames lost"),
            (f"increase({of('kv_event_gaps')}[$__rate_interval])", "{{instance}} {{dp_rank}} gaps"),
            (f"increase({of('kv_event_frames_replayed')}[$__rate_interval])", "{{instance}} {{dp_rank}} replayed"),
            span=6,
        ),
        lines(
            "KV events a second",
            "Taken from SGLang.",
            (f"rate({of('kv_events')}[$__rate_interval])", "{{instance}} {{dp_rank}}"),
            span=6,
        ),
        lines(
            "KV blocks, as the router knows them",
            "By the engine's own events. Unvouched: withdrawn after a loss. Unplaced: their parent is not known.",
            (of("kv_blocks"), "{{instance}} {{dp_rank}}"),
            (of("kv_blocks_unvouched"), "{{instance}} {{dp_rank}} unvouched"),
            (of("kv_blocks_unplaced"), "{{instance}} {{dp_rank}} unplaced"),
            span=6,
        ),
        lines(
            "KV publishers",
            "Workers and DP ranks that events are published for: agents times ranks.",
            (of("kv_publishers"), "{{instance}}"),
            span=6,
        ),
    ]


def _machine() -> list[Panel]:
    def gpu(name: str) -> str:
        return f"sgnode_gpu_{name}{{{NODE}}}"

    def process(name: str) -> str:
        return f"sgnode_process_{name}{{{NODE}}}"

    each, device = "{{instance}} {{process}}", "{{instance}} GPU {{gpu}}"
    return [
        lines(
            "GPU memory in use",
            "By whomever.",
            (f"{gpu('memory_used_bytes')} / {gpu('memory_total_bytes')}", device),
            unit="percentunit",
            top=1,
        ),
        lines(
            "GPU utilisation",
            "Part of the time in which a kernel ran.",
            (gpu("utilization_ratio"), device),
            unit="percentunit",
            top=1,
        ),
        lines(
            "GPU temperature and power",
            "Celsius, and watts.",
            (gpu("temperature_celsius"), f"{device} °C"),
            (gpu("power_watts"), f"{device} W"),
        ),
        lines("Resident memory by process", "", (process("resident_memory_bytes"), each), unit="bytes", stacked=True),
        lines("CPU by process", "1: one core.", (f"rate({process('cpu_seconds_total')}[$__rate_interval])", each), stacked=True),
        lines("Open file descriptors by process", "What grows without end leaks.", (process("open_fds"), each)),
    ]


def _frontend() -> list[Panel]:
    def rate(name: str, by: str) -> str:
        return f"sum by ({by}) (rate(dynamo_frontend_{name}{{{FRONTEND}}}[$__rate_interval]))"

    ttft, itl, duration = (
        f"dynamo_frontend_{name}_seconds_bucket{{{FRONTEND}}}"
        for name in ("time_to_first_token", "inter_token_latency", "request_duration")
    )
    return [
        lines(
            "Requests a second, by status",
            "",
            (rate("requests_total", "model, status, error_type"), "{{model}} {{status}} {{error_type}}"),
            unit="reqps",
        ),
        lines("Time to first token, at the frontend", "", *quantiles(ttft), unit="s"),
        lines("Time from token to token, at the frontend", "", *quantiles(itl), unit="s"),
        lines("Duration of requests", "", *quantiles(duration), unit="s"),
        lines("Output tokens a second", "", (rate("output_tokens_total", "model"), "{{model}}")),
        lines("Active requests", "", (f"sum by (model) (dynamo_frontend_active_requests{{{FRONTEND}}})", "{{model}}")),
        lines(
            "Moved to another worker, a second",
            "By kind and outcome.",
            (rate("model_migration_total", "model, migration_type"), "{{model}} {{migration_type}}"),
            unit="reqps",
            span=12,
        ),
        lines(
            "Cancelled a second, at the frontend",
            "",
            (rate("model_cancellation_total", "model"), "{{model}}"),
            unit="reqps",
            span=12,
        ),
    ]


def _sglang() -> list[Panel]:
    def of(name: str) -> str:
        return f"sglang:{name}{{{ENGINE}}}"

    return [
        lines(
            "Token usage",
            "Share of the KV cache's tokens in use.",
            (of("token_usage"), "{{instance}} {{tp_rank}}"),
            unit="percentunit",
            top=1,
        ),
        lines("Prefix cache hit rate", "", (of("cache_hit_rate"), "{{instance}} {{tp_rank}}"), unit="percentunit", top=1),
        lines("Generated tokens a second", "As SGLang's scheduler counts.", (of("gen_throughput"), "{{instance}} {{tp_rank}}")),
        lines(
            "Running and queued in SGLang",
            "",
            (of("num_running_reqs"), "{{instance}} running"),
            (of("num_queue_reqs"), "{{instance}} queued"),
        ),
        lines("Time in SGLang's queue", "", *quantiles(of("queue_time_seconds_bucket")), unit="s"),
        lines(
            "Retracted and paused",
            "",
            (of("num_retracted_reqs"), "{{instance}} retracted"),
            (of("num_paused_reqs"), "{{instance}} paused"),
        ),
    ]


ROWS: dict[str, Callable[[], list[Panel]]] = {
    "Is it up": _up,
    "Is it slow": _slow,
    "What is it waiting for": _waiting,
    "Did the router lose track": _router,
    "The machine": _machine,
    "Frontend": _frontend,
    "SGLang": _sglang,
}


def _variables(board: Dashboard) -> None:
    board.with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    known = "dynamo_component_inflight_requests"
    seen = f'{{__name__=~"sgnode_incarnation|{known}",dynamo_namespace=~"$namespace"}}'
    for name, query in {
        "namespace": f"label_values({known}, dynamo_namespace)",
        "node": f"label_values({seen}, instance)",  # a node without agents has no namespace: it is there under "All"
        "worker": f"label_values({known}{{{NODE}}}, worker_id)",
        "model": f"label_values({known}{{{NODE}}}, model)",
    }.items():
        variable = dashboard.QueryVariable(name).query(query).datasource(SOURCE).multi(True).include_all(True).all_value(".*")
        board.with_variable(variable.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC))


def build() -> Dashboard:
    """The dashboard, in the order of the questions."""
    board = (
        Dashboard("sgnode")
        .uid("sgnode")
        .tags(["sgnode", "sglang", "dynamo"])
        .time("now-1h", "now")
        .refresh("10s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
    )
    board.timezone("browser").description(
        "Is it up, is it slow, what is it waiting for, did the router lose track. docs/monitoring.md of sgnode"
    )
    _variables(board)
    ids = itertools.count(1)
    for title, panels in ROWS.items():
        board.with_row(dashboard.Row(title).id(next(ids)))
        for panel in panels():
            board.with_panel(panel.id(next(ids)))
    return board


def text() -> str:
    """What grafana/sgnode.json has."""
    return JSONEncoder(sort_keys=True, indent=1).encode(build().build()) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(text())
