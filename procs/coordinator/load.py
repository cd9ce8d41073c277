"""What the node carries and how fast: streams, tokens a second, latencies, KV use; from the beats, for the status document."""

import json
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shared.frames import Beat, KvUse
from shared.state import UP, State

RATE_SECONDS = 2.0
"""Tokens a second are those of about so long."""
LAST_LOAD_FILE = "last-load.json"
"""Beside the logs, which outlive a node: ``{"model_path": …, "seconds": …}``."""
LATENCIES = ("ttft", "itl")


class Load:
    """Hears what the coordinator hears. ``directory``: of the logs."""

    def __init__(self, directory: Path, model_path: str, clock: Callable[[], float]) -> None:
        self._file = directory / LAST_LOAD_FILE
        self._model_path = model_path
        self._clock = clock
        self._tokens: deque[tuple[float, float]] = deque()
        self._life = (0, 0)
        self._kv: dict[int, KvUse] = {}
        self._loading_since: float | None = None
        """UNIX seconds: since when the engine loads, its imports included."""
        self.last_seconds = self._read()
        """What the last load took; None when it is not known."""

    def hear(self, frame: Beat | KvUse) -> None:
        if isinstance(frame, KvUse):
            self._kv = {rank: use for rank, use in self._kv.items() if use.incarnation >= frame.incarnation}
            self._kv[frame.dp_rank] = frame
        elif frame.process == "engine":
            if self._life != (frame.incarnation, frame.pid):
                self._life = (frame.incarnation, frame.pid)
                self._tokens.clear()
                self._loading_since = None
            self._time_load(frame)
            if "tokens" in frame.numbers:
                self._count(frame.numbers["tokens"])

    def _count(self, tokens: float) -> None:
        now = self._clock()
        self._tokens.append((now, tokens))
        while len(self._tokens) > 2 and self._tokens[1][0] <= now - RATE_SECONDS:
            self._tokens.popleft()

    def _time_load(self, engine: Beat) -> None:
        if engine.state == State.LOADING:
            self._loading_since = engine.since
        elif engine.state in UP and self._loading_since is not None:
            self.last_seconds = engine.since - self._loading_since
            self._loading_since = None
            self._write()

    def document(self, agents: Sequence[Beat], incarnation: int, *, up: bool) -> dict[str, Any]:
        """Keys of the status document. ``agents``: fresh beats. ``up``: the engine is there and is heard.

        Latencies are in seconds; over several agents p50 is their mean by samples, p99 the worst of them.
        """
        found: dict[str, Any] = {
            "streams": sum(int(agent.numbers.get("inflight", 0)) for agent in agents),
            "tokens": None,
            "tokens_per_s": None,
            "kv": [],
            "loading_since": self._loading_since if up else None,
            "last_load_s": None if self.last_seconds is None else round(self.last_seconds, 1),
        }
        if up and self._tokens:
            (before, then), (now, tokens) = self._tokens[0], self._tokens[-1]
            found["tokens"] = int(tokens)
            found["tokens_per_s"] = round((tokens - then) / (now - before), 1) if now > before else None
            found["kv"] = [
                {
                    "dp_rank": rank,
                    "used_blocks": use.used_blocks,
                    "total_blocks": use.total_blocks,
                    "waiting": use.waiting,
                    "prefix_hit_rate": round(use.prefix_hit_rate, 3),
                }
                for rank, use in sorted(self._kv.items())
                if use.incarnation == incarnation
            ]
        return found | {name: _latency(name, [agent.numbers for agent in agents]) for name in LATENCIES}

    def _read(self) -> float | None:
        try:
            kept = json.loads(self._file.read_bytes())
            return float(kept["seconds"]) if kept["model_path"] == self._model_path else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self) -> None:
        try:
            self._file.write_text(json.dumps({"model_path": self._model_path, "seconds": self.last_seconds}))
        except OSError:  # a full disk: the next load has nothing to be compared with
            return


def _latency(name: str, numbers: Sequence[dict[str, float]]) -> dict[str, float] | None:
    """Recent quantiles over all agents; None when nothing came lately."""
    there = [each for each in numbers if each.get(f"{name}_samples")]
    if not there:
        return None
    samples = sum(each[f"{name}_samples"] for each in there)
    p50 = sum(each[f"{name}_p50_seconds"] * each[f"{name}_samples"] for each in there) / samples
    p99 = max(each[f"{name}_p99_seconds"] for each in there)
    return {"p50_s": round(p50, 6), "p99_s": round(p99, 6), "samples": int(samples)}
