"""Any other rank at work: the follower's state machine on its socket and its timers."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

import zmq

from procs.coordinator.group.follower import Follower
from procs.coordinator.group.group import PAUSE_SECONDS, TICK_SECONDS, Group, Over
from procs.coordinator.group.leader import RUNS
from procs.coordinator.group.leading import host_name
from procs.coordinator.group.link import FollowerLink
from procs.coordinator.node import Facts
from shared import epoch
from shared import group_key as key
from shared.config import NodeConfig
from shared.frames import FromLeader, Refused
from shared.state import BEAT_SECONDS


class Following(Group):
    """See Group."""

    def __init__(self, config: NodeConfig, on_change: Callable[[], None], over: Over) -> None:
        self._config = config
        self._on_change = on_change
        self._over = over
        self._want = "serve"
        self._say_at = 0.0
        self._unmet = ""

    def begin(self, document: dict[str, Any], *, alive: bool) -> None:
        config = self._config
        host, port = config.group_address
        self._follower = Follower(
            config.node_rank, config.nnodes, f"{host}:{port}", host_name(config), config.node_id, config.group_facts,
            uuid.uuid4().hex[:12], config.group_deadline, time.monotonic(), epoch.load(config.path), "up" if alive else "none",
        )  # fmt: skip
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        secret = key.load(config.group_key_file)
        self._link = FollowerLink(self._context, (host, port), secret, config.group_deadline, self._hear, self._troubled)
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while True:
            now = time.monotonic()
            self._look(now)
            if now >= self._say_at:
                self._say()
            await asyncio.sleep(TICK_SECONDS)

    def _hear(self, frame: FromLeader) -> None:
        follower, now = self._follower, time.monotonic()
        if isinstance(frame, Refused):
            if frame.reason != follower.refused:
                logging.error("the leader refuses this node: %s", frame.reason)
            follower.refuse(frame.reason)
            self._look(now)
            return
        was = follower.said
        follower.hear(frame, now)
        self._look(now)
        if was is None or (was.state, was.progress) != (frame.state, frame.progress):
            self._on_change()
        if was is None or (was.life, was.epoch, was.open) != (frame.life, frame.epoch, frame.open):
            logging.info(
                "epoch %d is %s", frame.epoch, "open" if frame.open else f"over: {frame.reason}" if frame.reason else "not open"
            )
            self._say()  # the next one may wait for everybody to have heard this

    def _troubled(self, trouble: str) -> None:
        if trouble and trouble != self._follower.trouble:
            logging.error("the leader at %s: %s", self._follower.place, trouble)
        self._follower.trouble = trouble
        if not trouble:
            self._say()  # connected just now

    def _look(self, now: float) -> None:
        if over := self._follower.over(now):
            self._over(over, self._follower.orderly)
        unmet = self._follower.unmet(now)
        if bool(unmet) != bool(self._unmet):
            self._on_change()
        self._unmet = unmet

    def _say(self, pause: float = 0.0) -> None:
        self._say_at = time.monotonic() + BEAT_SECONDS
        self._link.say(self._follower.frame(time.time(), self._want, pause))

    def close(self, *, leaving: bool) -> None:
        self._task.cancel()
        if not leaving:
            self._say(PAUSE_SECONDS)
        self._link.close()
        self._context.term()

    # --- Group ---

    @property
    def epoch(self) -> int:  # type: ignore[override]
        return self._follower.ran.epoch

    def unmet(self) -> str | None:
        return self._follower.unmet(time.monotonic()) or None

    def starting(self) -> None:
        epoch.save(self._config.path, self._follower.start())
        self._say()

    def set_engine(self, engine: str, reason: str) -> None:
        if (engine, reason) != (self._follower.engine, self._follower.reason):
            self._follower.engine, self._follower.reason = engine, reason
            self._say()

    def set_want(self, want: str) -> None:
        if want != self._want:
            self._want = want
            self._say()

    @property
    def holds_stop(self) -> bool:
        follower, said = self._follower, self._follower.said
        if said is None or not said.open or not follower.in_contact(time.monotonic()):
            return False
        return follower.is_ours and follower.engine in RUNS

    def workers(self, facts: Facts) -> list[str]:
        return [] if self._follower.said is None else self._follower.said.workers

    @property
    def progress(self) -> str:
        return self._follower.said.progress if self._follower.said is not None else ""

    @property
    def leader_state(self) -> str:
        return self._follower.said.state if self._follower.said is not None else ""

    def document(self) -> dict[str, Any]:
        follower, now = self._follower, time.monotonic()
        said = follower.said if follower.in_contact(now) else None
        return {
            "holds_stop": self.holds_stop,
            "group": {
                "nnodes": follower.nnodes,
                "leader": follower.place,
                "open": said is not None and said.open,
                "reason": "" if said is None or said.open else said.reason,
                "leader_state": said.state if said is not None else "",
                "epoch": said.epoch if said is not None else 0,
            },
        }
