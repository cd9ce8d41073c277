"""Many ranks of a group in one process: their real sockets and timers, each with an engine that only waits.

A Room plays the coordinator's part (procs/coordinator/coordinator.py); a Watch sees every engine and knows what may not be.
"""

import asyncio
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from procs.coordinator import group
from procs.coordinator.group import Group
from procs.coordinator.group.following import Following
from procs.coordinator.group.leading import Leading
from shared import epoch
from shared.config import NodeConfig
from shared.epoch import Started

DEADLINE = 2.0
READY_SECONDS = 0.01
CLEARING_SECONDS = 0.005


@dataclass
class Watch:
    """What all rooms of a process have done."""

    living: Counter[Started] = field(default_factory=Counter)
    ever: set[tuple[int, Started]] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    gone_at: float = 0.0
    """When the last engine that died had left nothing."""

    def begins(self, rank: int, started: Started) -> None:
        others = [other for other, count in self.living.items() if count and other != started]
        if others:
            self.wrong.append(f"rank {rank} starts an engine in {started} while there are some of {others}")
        if (rank, started) in self.ever:
            self.wrong.append(f"rank {rank} starts an engine twice in {started}")
        self.ever.add((rank, started))
        self.living[started] += 1

    def ends(self, started: Started) -> None:
        self.living[started] -= 1
        self.gone_at = time.monotonic()
        self.changed.set()


class Room:
    """One node: its coordinator's group, begun anew after each death, and its engine."""

    def __init__(self, rank: int, nnodes: int, port: int, directory: Path, watch: Watch, deadline: float = DEADLINE) -> None:
        self.rank, self._nnodes, self._port, self._directory, self._deadline = rank, nnodes, port, directory, deadline
        self._watch = watch
        self._node = ""
        self._group: Group | None = None
        self._engine: Started | None = None
        self._word = "none"
        """The engine's state, as Member has it."""

    # --- the coordinator's part ---

    def start_node(self) -> None:
        """With a runtime directory of its own."""
        self._node = uuid.uuid4().hex[:12]
        self.start_coordinator()

    def start_coordinator(self) -> None:
        path = self._directory / self._node
        path.mkdir(exist_ok=True)
        config = NodeConfig(
            name=f"r{self.rank}", runtime_dir=str(path), version="0", role="aggregated", model_path="/m", served_model_name="m",
            nnodes=self._nnodes, node_rank=self.rank, node_id=self._node, dist_init_addr=f"127.0.0.1:{self._port}",
            group_port=self._port, group_deadline=self._deadline, group_facts={"tp size": "8"},
        )  # fmt: skip
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._group = group.make(config, self._soon, self._over)
        self._group.begin({}, alive=self._engine is not None)
        self._tell()
        self._soon()

    def _soon(self) -> None:
        self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        if self._group is None or self._engine is not None or self._group.unmet() is not None:
            return
        self._group.starting()
        self._engine, self._word = epoch.load(self._path), "up"
        self._watch.begins(self.rank, self._engine)
        self._tell()
        self._loop.call_later(READY_SECONDS, self._becomes, self._engine, "ready")

    def _becomes(self, engine: Started, word: str) -> None:
        if self._engine != engine or (word == "ready" and self._word != "up"):
            return
        self._word = word
        if word == "none":
            self._engine = None
            self._watch.ends(engine)
        self._tell()
        self._soon()
        self._watch.changed.set()

    def _tell(self) -> None:
        if self._group is not None:
            self._group.set_engine(self._word, "killed" if self._word == "dead" else "")

    def _over(self, _reason: str, _orderly: bool) -> None:
        self.kill_engine()

    # --- deaths ---

    def kill_engine(self) -> None:
        if self._engine is not None and self._word != "dead":
            self._word = "dead"
            self._loop.call_later(CLEARING_SECONDS, self._becomes, self._engine, "none")
            self._tell()

    def kill_coordinator(self) -> None:
        """As SIGKILL: it says nothing more."""
        if isinstance(self._group, Leading | Following):
            self._group._task.cancel()
            if self._group._link is not None:
                self._group._link.close()
            self._group._context.term()
        self._group = None

    def stop_coordinator(self) -> None:
        """As SIGTERM: it says that it comes back."""
        if self._group is not None:
            self._group.close(leaving=False)
            self._group = None

    def kill_node(self) -> None:
        self.kill_coordinator()
        if self._engine is not None:
            self._watch.ends(self._engine)
            self._engine, self._word = None, "none"

    # --- what is to be seen ---

    @property
    def epoch(self) -> int:
        return self._group.epoch if self._group is not None else 0

    def runs(self) -> Started | None:
        """The epoch in which its engine is ready."""
        return self._engine if self._word == "ready" and self._group is not None else None

    def is_open(self) -> bool:
        return self._group is not None and bool(self._group.document()["group"]["open"])

    def last_heard(self) -> list[float]:
        """Of the leader: how many seconds ago it heard each rank; infinite for one that it has not in this life."""
        ranks = [] if self._group is None else self._group.document()["group"]["ranks"]
        return [float("inf") if rank["seen_s"] is None else rank["seen_s"] for rank in ranks]

    def all_ready(self) -> bool:
        """Of the leader: as far as it has heard, every engine is ready in the open epoch."""
        if self._group is None or self._word != "ready":
            return False
        ranks = self._group.document()["group"]["ranks"]
        return self.is_open() and all((rank["engine"], rank["epoch"]) == ("ready", self.epoch) for rank in ranks)
