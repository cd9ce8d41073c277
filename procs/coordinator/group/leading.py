"""Rank 0 at work: the leader's state machine on its socket and its timers."""

import asyncio
import logging
import socket
import time
import uuid
from collections.abc import Callable
from typing import Any

import zmq

from procs.coordinator.group.group import PAUSE_SECONDS, TICK_SECONDS, Group, Over
from procs.coordinator.group.leader import RUNS, Leader
from procs.coordinator.group.link import LeaderLink, tcp
from procs.coordinator.node import Facts, NodeState
from shared import epoch
from shared import group_key as key
from shared.config import NodeConfig
from shared.frames import Member, Refused
from shared.state import BEAT_SECONDS, State

BIND_AGAIN_SECONDS = 1.0
SETTLE_SECONDS = 0.005
"""All ranks speak at the same moments: an answer to each of them would be nnodes**2 frames."""
LEFT = (State.DRAINED, State.WAITING, State.STARTING, State.STOPPED)
"""States of an agent that has no stream and gets none while the node drains."""


class Leading(Group):
    """See Group."""

    def __init__(self, config: NodeConfig, on_change: Callable[[], None], over: Over) -> None:
        self._config = config
        self._on_change = on_change
        self._over = over
        self._link: LeaderLink | None = None
        self._trouble = ""
        self._bind_at = self._say_at = 0.0
        self._unmet = self._wish = self._adopted_wish = ""
        self._differences: list[str] = []
        self._state = self._progress = self._waiting_for = ""
        self._stopping = False
        self._workers: list[str] = []
        self._soon: asyncio.TimerHandle | None = None
        self._news = False

    def begin(self, document: dict[str, Any], *, alive: bool) -> None:
        config, now = self._config, time.monotonic()
        was = epoch.load(config.path)
        self._leader = Leader(
            config.nnodes, config.group_facts, uuid.uuid4().hex[:12], was.group or uuid.uuid4().hex[:12], config.group_deadline,
            now, was.epoch, alive and bool(was.epoch), engine="up" if alive else "none",
        )  # fmt: skip
        self._adopted_wish = str(document.get("wish", ""))
        self._began = now
        self._key = key.load(config.group_key_file)
        if self._key is None:
            logging.warning("whoever reaches %s:%d can join the group (%s closes it)", *config.group_address, key.FLAG)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while True:
            now = time.monotonic()
            if self._link is None and now >= self._bind_at:
                self._bind(now)
            self._look(now)
            if now >= self._say_at:
                self._say(now)
            await asyncio.sleep(TICK_SECONDS)

    def _bind(self, now: float) -> None:
        config = self._config
        try:
            address = tcp(*config.group_address)
            self._link = LeaderLink(self._context, address, self._key, config.group_deadline, self._hear)
        except (zmq.ZMQError, OSError) as error:
            self._bind_at = now + BIND_AGAIN_SECONDS
            trouble = f"the group's socket {config.group_address[0]}:{config.group_address[1]}: {error.strerror}"
            if trouble != self._trouble:
                logging.error("%s (another leader? --group-port)", trouble)
            self._trouble = trouble
            return
        self._trouble = ""
        logging.info("rank 0 of %d: the group meets at %s", config.nnodes, address)

    def _hear(self, member: Member) -> Refused | None:
        now = time.monotonic()
        rank = self._leader.ranks.get(member.node_rank)
        was = rank.member if rank is not None else None
        refused = self._leader.hear(member, now, time.time())
        if refused is None:
            news = was is None or _news(was) != _news(member)
            self._news = self._news or news
            if was is None or was.life != member.life:
                self._look(now)  # before anything is said to it: an open epoch may not be for it
            if (news or not self._leader.open) and self._soon is None:
                self._soon = asyncio.get_running_loop().call_later(SETTLE_SECONDS, self._settled)
        return refused

    def _settled(self) -> None:
        """What many ranks said at once is looked at once, and answered with one frame each."""
        self._soon, news, self._news = None, self._news, False
        now = time.monotonic()
        self._look(now)
        if news:
            self._say(now)
            self._on_change()

    def _look(self, now: float) -> None:
        if self._leader.look(now):
            self._ended(now)
        elif not self._leader.open and self._leader.engine in RUNS:
            # Of an epoch that nobody remembers, or one whose end has not reached it.
            self._over(self._leader.reason or "no epoch is open", self._leader.orderly)
        differences = self._leader.differences()
        if differences != self._differences:
            for line in differences:
                logging.error("%s", line)
            self._differences = differences
        unmet, wish = self._blocked(now), self.wish()
        if (bool(unmet), wish) != (bool(self._unmet), self._wish):
            self._on_change()
        self._unmet, self._wish = unmet, wish

    def _ended(self, now: float) -> None:
        leader = self._leader
        logging.log(logging.INFO if leader.orderly else logging.ERROR, "epoch %d is over: %s", leader.epoch, leader.reason)
        self._say(now)
        self._over(self._leader.reason, self._leader.orderly)
        self._on_change()

    def _blocked(self, now: float) -> str:
        """What the next epoch waits for; empty when it may open, and while one is."""
        return "" if self._leader.open else self._trouble or self._leader.unmet(now)

    def _say(self, now: float, pause: float = 0.0) -> None:
        self._say_at = now + BEAT_SECONDS
        if self._link is not None:
            how = {"waiting_for": self._waiting_for, "state": self._state, "progress": self._progress}
            self._link.say(self._leader.frame(now, **how, workers=self._workers, pause=pause))

    def close(self, *, leaving: bool) -> None:
        self._task.cancel()
        if self._soon is not None:
            self._soon.cancel()
        if self._link is not None:
            if leaving:
                self._leader.end("the leader has stopped", orderly=True)
                self._state, self._waiting_for = State.STOPPED, "the leader, which has stopped"
            self._say(time.monotonic(), 0.0 if leaving else PAUSE_SECONDS)
            self._link.close()
        self._context.term()

    # --- Group ---

    @property
    def epoch(self) -> int:  # type: ignore[override]
        return self._leader.epoch

    def unmet(self) -> str | None:
        if self._leader.open:
            return f"the end of epoch {self._leader.epoch}"
        return self._blocked(time.monotonic()) or None

    def starting(self) -> None:
        now = time.monotonic()
        epoch.save(self._config.path, self._leader.start(now))
        logging.info("epoch %d is open: all %d ranks are here", self._leader.epoch, self._leader.nnodes)
        self._say(now)

    def set_engine(self, engine: str, reason: str) -> None:
        if engine == self._leader.engine:
            return
        self._leader.engine = engine
        now = time.monotonic()
        if self._leader.open and engine not in RUNS:
            self._leader.end(f"rank 0: {reason or 'its engine is gone'}", orderly=self._stopping)
            self._ended(now)

    def set_want(self, want: str) -> None:
        self._stopping = want == "stop"

    def heed(self, facts: Facts, node: NodeState) -> None:
        changed = node.state != self._state
        self._state, self._progress = node.state, node.reason if node.state == State.DRAINING else ""
        self._waiting_for = ": ".join(part for part in ("the leader", node.reason, node.waiting_for) if part)
        self._workers = self.workers(facts)
        if changed:
            self._say(time.monotonic())
        wishing = self._leader.wish(time.monotonic())
        drained = facts.want != "serve" and not facts.registered and not facts.streams
        if wishing is None or wishing[1].want != "stop" or not self._leader.open or not drained:
            return
        if all(agent.state in LEFT for agent in facts.agents):
            self.end(self._words(*wishing))

    @staticmethod
    def _words(number: int, member: Member) -> str:
        return f"rank {number} ({member.host}) {'is stopping' if member.want == 'stop' else 'drains'}"

    def wish(self) -> str:
        now = time.monotonic()
        wishing = self._leader.wish(now)
        if wishing is not None:
            return self._words(*wishing)
        known = all(rank.member is not None for rank in self._leader.ranks.values())
        return "" if known or now - self._began > self._config.group_deadline else self._adopted_wish

    def end(self, reason: str) -> None:
        if self._leader.open:
            self._leader.end(reason, orderly=True)
            self._ended(time.monotonic())

    def document(self) -> dict[str, Any]:
        config, leader, now = self._config, self._leader, time.monotonic()
        ranks = [
            {
                "node_rank": number,
                "host": rank.member.host if rank.member is not None else "",
                "engine": rank.member.engine if rank.member is not None else "",
                "epoch": rank.member.epoch if rank.member is not None else 0,
                "seen_s": round(now - rank.since, 1) if rank.member is not None else None,
                "refused": leader.twin(number, now),
            }
            for number, rank in leader.ranks.items()
        ]
        host, port = config.group_address
        return {
            "wish": self._wish,
            "group": {
                "nnodes": config.nnodes,
                "leader": f"{host}:{port}",
                "open": leader.open,
                "reason": "" if leader.open else leader.reason,
                "differences": self._differences,
                "ranks": ranks,
            },
        }


def _news(member: Member) -> tuple[str, str, int, str]:
    """What of a rank everybody should hear of at once."""
    return member.life, member.engine, member.epoch, member.want


def host_name(config: NodeConfig) -> str:
    """What a node is called in the group: its name and its machine."""
    return f"{config.name}@{socket.gethostname()}"
