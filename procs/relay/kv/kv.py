"""Puts the KV rooms together: sources and mirrors of the running engine, published under the workers that there are."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import zmq

from procs.relay.kv.cluster import Cluster
from procs.relay.kv.mirror import Mirror
from procs.relay.kv.outlet import Outlet, Publisher
from procs.relay.kv.source import Source
from procs.relay.kv.wire import Reader
from shared import kv_sources
from shared.config import NodeConfig
from shared.frames import Beat
from shared.kv_sources import KvSources
from shared.state import UP

LOOK_SECONDS = 1.0
"""Between two looks at discovery; what changes here is acted upon at once."""
GONE_SECONDS = 3.0
"""A worker is gone when the coordinator hasn't named it for so long: closing its publisher costs a router all that it knows."""
MISSING_LOOKS = 5
"""So many looks in a row without our records: a new publisher's come a moment later."""


class Runtime(Protocol):
    """See procs.relay.kv.cluster.Cluster."""

    @property
    def ended(self) -> bool: ...
    def publisher(self, worker: int, rank: int, block_size: int) -> Publisher: ...
    def clear(self, sources: set[tuple[int, int]]) -> int: ...
    def missing(self, sources: set[tuple[int, int]]) -> bool: ...
    def close(self) -> None: ...


@dataclass
class Rank:
    """One DP rank of the running engine."""

    mirror: Mirror
    source: Source


class KvEvents:
    """Fed with beats and deaths. Nothing is made, and Dynamo isn't imported, before an engine says where its events are."""

    def __init__(
        self,
        config: NodeConfig,
        context: zmq.Context[zmq.Socket[bytes]],
        changed: Callable[[], None],
        open_runtime: Callable[[NodeConfig], Awaitable[Runtime]] = Cluster.open,
    ) -> None:
        self._config = config
        self._context = context
        self._changed = changed
        self._open_runtime = open_runtime
        self._runtime: Runtime | None = None
        self._reader = Reader()
        self._ranks: dict[int, Rank] = {}
        self._outlet = Outlet()
        self._incarnation = self._dead = 0
        self._workers: dict[int, float] = {}
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._troubled = ""
        self._absent = 0

    # --- what is heard ---

    def hear(self, beat: Beat) -> None:
        """Of the engine and of the coordinator; other beats are of no use here."""
        if beat.process == "engine" and beat.incarnation > max(self._incarnation, self._dead) and beat.state in UP:
            self._begin(beat.incarnation, kv_sources.said(beat.info))
        elif beat.process == "coordinator" and "workers" in beat.info:
            now = time.monotonic()
            named = {int(worker) for worker in beat.info["workers"].split(",") if worker.isdigit()}
            new = not named <= self._workers.keys()
            self._workers = {worker: at for worker, at in self._workers.items() if now - at < GONE_SECONDS}
            self._workers |= dict.fromkeys(named, now)
            if new or any(worker not in self._workers for worker, _ in self._outlet.shown):
                self._wake.set()

    def dead(self, incarnation: int) -> None:
        """That engine's blocks are gone with it."""
        self._dead = max(self._dead, incarnation)
        if incarnation >= self._incarnation:
            self._end()

    def _begin(self, incarnation: int, sources: KvSources | None) -> None:
        self._end()
        self._incarnation = incarnation
        if sources is None:
            return
        for number, where in sources.ranks.items():
            mirror = Mirror(sources.block_size)
            source = Source(self._context, where.events, where.replay, self._taker(number), self._loser(number))
            self._ranks[number] = Rank(mirror, source)
        logging.info("KV events of incarnation %d: %s", incarnation, sources)
        self._wake.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())

    def _end(self) -> None:
        for rank in self._ranks.values():
            rank.source.close()
        self._ranks = {}
        self._outlet.close()
        self._changed()

    def _taker(self, number: int) -> Callable[[bytes], None]:
        def take(payload: bytes) -> None:
            rank = self._ranks[number]
            for event in self._reader.read(payload):
                self._outlet.publish(number, rank.mirror.apply(event), rank.mirror.block_size)

        return take

    def _loser(self, number: int) -> Callable[[], None]:
        def lost() -> None:
            mirror = self._ranks[number].mirror
            self._outlet.publish(number, mirror.lose(), mirror.block_size)
            self._changed()

        return lost

    # --- what is published ---

    async def _work(self) -> None:
        """Bring what is published to what there is, again and again: discovery may be gone, or have lost us."""
        while True:
            self._wake.clear()
            try:
                await self._settle()
                self._say("")
            except Exception as error:  # Dynamo raises bare Exceptions
                self._say(f"KV events are not published: {error or type(error).__name__}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._wake.wait()

    async def _settle(self) -> None:
        if self._runtime is not None and self._runtime.ended:
            logging.warning("KV events: the Dynamo runtime has ended; everything is published again by another")
            self._outlet.close()
            self._runtime.close()
            self._runtime = None
        if self._runtime is None:
            if not self._ranks or not self._workers:
                return
            self._runtime = await self._open_runtime(self._config)
        self._absent = self._absent + 1 if self._runtime.missing(self._outlet.shown) else 0
        if self._absent > MISSING_LOOKS:
            logging.warning("KV events: our records in discovery were expired by others; everything is published again")
            self._absent = 0
            self._outlet.close()
        wanted = {(worker, rank) for worker in self._workers for rank in self._ranks}
        if (new := wanted - self._outlet.shown) and (cleared := self._runtime.clear(new)):
            logging.info("KV events: removed %d records that an earlier relay left", cleared)
        self._outlet.show(
            set(self._workers), {number: rank.mirror for number, rank in self._ranks.items()}, self._runtime.publisher
        )

    def _say(self, trouble: str) -> None:
        if trouble != self._troubled:
            if trouble:
                logging.warning("%s", trouble)
            self._troubled = trouble
            self._changed()

    # --- what is said ---

    @property
    def detail(self) -> str:
        """For an operator: what is wrong; empty when nothing is."""
        lossy = {number: rank for number, rank in self._ranks.items() if not rank.mirror.exact}
        said = [self._troubled] if self._troubled else []
        for number, rank in lossy.items():
            why = "replay_endpoint has them no longer" if rank.source.replays else "no replay_endpoint in --kv-events-config"
            said.append(
                f"KV events of DP rank {number} are incomplete: {rank.source.lost} frames lost ({why}); "
                "routers get earlier blocks back as later events prove them"
            )
        return "; ".join(said)

    def numbers(self) -> dict[str, float]:
        """By DP rank, for the Beat: see procs.relay.node_metrics."""
        found: dict[str, float] = {}
        for number, rank in self._ranks.items():
            source, mirror = rank.source, rank.mirror
            found |= {
                f"kv_event_frames_dp{number}": source.frames,
                f"kv_event_gaps_dp{number}": source.gaps,
                f"kv_event_frames_replayed_dp{number}": source.replayed,
                f"kv_event_frames_lost_dp{number}": source.lost,
                f"kv_events_dp{number}": mirror.events,
                f"kv_events_cleared_dp{number}": mirror.clears,
                f"kv_blocks_dp{number}": len(mirror.blocks),
                f"kv_blocks_unvouched_dp{number}": len(mirror.unsure),
                f"kv_blocks_unplaced_dp{number}": mirror.unplaced,
            }
        if found:
            malformed = sum(rank.source.malformed for rank in self._ranks.values())
            found |= {"kv_publishers": len(self._outlet.shown), "kv_events_dropped": self._reader.dropped + malformed}
        return found

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._end()
        if self._runtime is not None:
            self._runtime.close()
