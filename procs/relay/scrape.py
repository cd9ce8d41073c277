"""One scrape of the node: all sources asked at once, each for so long, and what came in time as one text."""

import asyncio
import json
import time
from collections.abc import Awaitable, Mapping
from typing import Any

from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from procs.relay import node_metrics
from procs.relay.aside import Aside
from procs.relay.engine_metrics import EngineMetrics
from procs.relay.gpu_metrics import GpuMetrics
from procs.relay.process_metrics import Processes
from procs.relay.remote import Agents
from procs.relay.text import expose, merge
from shared import supervisord
from shared.config import NodeConfig
from shared.frames import KvUse
from shared.state import Board

STEP_SECONDS = 0.3
"""For each of two that follow one another: supervisord's word, and the processes that it names."""


class Scraper:
    """Reads the board; asks supervisord, /proc, the driver, SGLang's files and the agents."""

    def __init__(self, config: NodeConfig, board: Board) -> None:
        self._config = config
        self._board = board
        self._agents = Agents()
        self._worker = ""
        """Of agent:0 when it last said; decimal."""
        self._pids: dict[str, int] = {}
        processes, engine, gpus = Processes(), EngineMetrics(config), GpuMetrics(config)
        self._status = Aside("supervisord", self._ask_supervisord)
        self._processes = Aside("processes", lambda: processes.families(self._pids))
        self._engine = Aside("engine", lambda: engine.render(board.beat("engine"), self._worker))
        self._gpus = Aside("gpus", gpus.families)
        self._took: dict[str, tuple[bool, float]] = {}
        """By source: whether it answered, and seconds."""

    async def text(self, use: dict[int, KvUse]) -> str:
        """Prometheus text, in 0.6 s and what it takes to put together, whatever hangs."""
        self._worker = self._worker_id() or self._worker
        told, engine, gpus, *agents = await asyncio.gather(
            self._node(), self._timed("engine", self._engine.get()), self._timed("gpus", self._gpus.get()), *self._fetches()
        )
        document, processes = told
        families = [*node_metrics.families(self._config, self._board, use, document), *processes, *(gpus or [])]
        return merge([expose([*families, *self._own()]), engine or "", *(found or "" for found in agents)])

    def _worker_id(self) -> str:
        """Whom SGLang's metrics are shown for: the first agent; on a follower the leader's."""
        if self._config.agent_names:
            beat = self._board.beat(self._config.agent_names[0])
            return beat.info.get("worker_id", "") if beat is not None else ""
        beat = self._board.beat("coordinator")
        return beat.info.get("workers", "").split(",")[0] if beat is not None else ""

    def _fetches(self) -> list[Awaitable[str | None]]:
        found: list[Awaitable[str | None]] = []
        for name in self._config.agent_names:
            beat = self._board.beat(name)
            if beat is not None and beat.info.keys() >= {"metrics_url", "worker_id"}:
                fetch = self._agents.fetch(name, beat.info["metrics_url"], beat.info["worker_id"])
                found.append(self._timed(name, fetch))
            else:
                self._took[name] = False, 0.0
        return found

    async def _timed(self, source: str, answer: Awaitable[Any]) -> Any:
        began = time.monotonic()
        found = await answer
        self._took[source] = found is not None, time.monotonic() - began
        return found

    async def _node(self) -> tuple[Mapping[str, Any] | None, list[Metric]]:
        document = await self._timed("supervisord", self._status.get(STEP_SECONDS))
        rows = {row["name"]: row.get("pid") or 0 for row in (document or {}).get("processes", [])}
        beats = {name: beat.pid for name in self._config.processes if (beat := self._board.beat(name)) is not None}
        self._pids = {**rows, **beats, "supervisord": (document or {}).get("supervisord_pid", 0)}
        return document, await self._timed("processes", self._processes.get(STEP_SECONDS)) or []

    def _ask_supervisord(self) -> Mapping[str, Any]:
        found = json.loads(supervisord.call(self._config.path, "sgnode.node", timeout=STEP_SECONDS))
        return found if isinstance(found, dict) else {}

    def _own(self) -> list[Metric]:
        success = GaugeMetricFamily(
            "sgnode_scrape_collector_success", "1 when the source of metrics answered in time", labels=["collector"]
        )
        duration = GaugeMetricFamily(
            "sgnode_scrape_collector_duration_seconds", "What its answer took, or was waited for", labels=["collector"]
        )
        for name, (fine, seconds) in self._took.items():
            success.add_metric([name], float(fine))
            duration.add_metric([name], seconds)
        return [success, duration]
