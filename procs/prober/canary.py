"""Canaries: the smallest real request by the same road as every other, one to each DP rank, and the verdict that follows."""

import asyncio
import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from procs.prober.judge import STRIKES, Detokenizer, Limits, Rank, WayOut, blocked
from shared.config import NodeConfig
from shared.engine_client import EngineClient, Stream
from shared.errors import RequestError
from shared.frames import Beat, Verdict, Welcome
from shared.roles import canary
from shared.roles.role import Payload, Role
from shared.state import State

TICK_SECONDS = 0.25
"""How often deadlines are looked at; everything else comes as an event."""


@dataclass
class Probe:
    """A canary that is out."""

    sent: float
    stream: Stream | None
    answer: "asyncio.Task[str]"

    def end(self) -> None:
        self.answer.cancel()
        if self.stream is not None:
            self.stream.abort()


class Canary:
    """Sends canaries while an engine is up. ``verdict`` is about the newest incarnation it has judged."""

    def __init__(self, config: NodeConfig, role: Role, client: EngineClient, said: Callable[[], None]) -> None:
        self._config = config
        self._limits = Limits(config.canary_wait, config.canary_timeout, config.busy_stall)
        self._role = role
        self._client = client
        self._changed = asyncio.Event()
        self._client.on_change = self._changed.set
        self._said = said
        self._stopped = ""
        self._resting = False
        self._welcome: Welcome | None = None
        self._ranks: list[Rank] = []
        self._probes: dict[int | None, Probe] = {}
        self._out, self._detokenizer = WayOut(self._limits), Detokenizer(self._limits)
        self.engine: Beat | None = None
        self.verdict: Verdict | None = None

    def hear_stopped(self, words: str) -> None:
        """What the keeper says of a process that is stopped by a signal; empty when all run."""
        if words != self._stopped:
            self._stopped = words
            self._changed.set()

    def hear_engine(self, beat: Beat) -> None:
        """Its counters, and whether it is paused or asleep: then a canary proves nothing."""
        self.engine = beat
        resting = beat.state in (State.PAUSED, State.SLEEPING)
        if resting != self._resting:
            self._resting = resting
            self._changed.set()
        if resting or self._welcome is None or beat.incarnation != self._welcome.incarnation:
            return
        now = time.monotonic()
        self._out.hear(beat, now)
        self._detokenizer.hear(beat, now)
        for rank in self._ranks:
            rank.hear(beat, now, flows=self._out.flows)

    async def run(self) -> None:
        """For ever."""
        tick = min(TICK_SECONDS, self._config.canary_timeout / 4)
        try:
            while True:
                self._changed.clear()
                self._look(time.monotonic())
                try:
                    async with asyncio.timeout(tick):
                        await self._changed.wait()
                except TimeoutError:
                    continue
        finally:
            self._drop_probes()

    def _look(self, now: float) -> None:
        welcome = None if self._resting else self._client.welcome
        if welcome is not self._welcome:
            self._begin(welcome, now)
        if welcome is None:
            return
        if self._stopped:
            # No canary proves more than this does, and it would wait for its whole timeout.
            self._begin(welcome, now)
            self._say(welcome, self._stopped)
            return
        engine = self.engine
        if engine is not None and engine.incarnation == welcome.incarnation and (words := blocked(engine, self._limits)):
            self._doubt(words)
        mute = self._out.words(now)
        for way in (self._out, self._detokenizer):
            if words := way.lost(now):
                if way.strike():
                    logging.warning("%s (1 of %d)", words, STRIKES)
                else:
                    self._doubt(words)
        for rank in self._ranks:
            self._look_at(rank, welcome, now, mute)
        self._conclude(welcome)

    def _begin(self, welcome: Welcome | None, now: float) -> None:
        """Another engine, or the same one after a rest: each rank has to answer at once."""
        self._drop_probes()
        self._welcome = welcome
        self._out, self._detokenizer = WayOut(self._limits), Detokenizer(self._limits)
        numbers = canary.ranks(self._role, welcome.facts) if welcome is not None else []
        known = welcome is not None and self.verdict is not None and self.verdict.incarnation == welcome.incarnation
        self._ranks = [Rank(self._limits, number, now, known=known) for number in numbers]

    def _doubt(self, words: str) -> None:
        for rank in self._ranks:
            rank.doubt(words)

    def _look_at(self, rank: Rank, welcome: Welcome, now: float, mute: str) -> None:
        probe = self._probes.get(rank.number)
        if probe is None:
            if rank.due(now, canaries=self._config.canaries):
                self._probes[rank.number] = self._send(welcome, rank.number, now)
            return
        problem, again = "", True
        if probe.answer.done():
            problem, again = probe.answer.result(), False
        elif problem := rank.late(probe.sent, now):
            problem = mute or problem  # it was answered, and is on its way out for ever
        else:
            return
        probe.end()
        del self._probes[rank.number]
        if not problem:
            rank.answered(now)
        elif rank.failed(problem, now, again=again):
            logging.warning("%s (1 of %d)", problem, STRIKES)
        self._changed.set()  # the next one may be due

    def _send(self, welcome: Welcome, rank: int | None, now: float) -> Probe:
        try:
            stream = self._client.submit(self._payload(welcome, rank))
        except RequestError as error:
            return Probe(now, None, asyncio.ensure_future(_said(f"a canary failed: {error.message}")))
        answer = asyncio.ensure_future(_first(stream))
        answer.add_done_callback(lambda _: self._changed.set())
        return Probe(now, stream, answer)

    def _payload(self, welcome: Welcome, rank: int | None) -> Payload:
        return canary.payload(self._role, welcome.facts, copy.deepcopy(self._config.health_check_payload), rank)

    def _conclude(self, welcome: Welcome) -> None:
        bad = [rank for rank in self._ranks if rank.fine is False]
        if bad:
            self._say(welcome, bad[0].reason)
        elif all(rank.fine for rank in self._ranks):
            self._say(welcome, "")

    def _say(self, welcome: Welcome, problem: str) -> None:
        verdict = Verdict(welcome.incarnation, not problem, problem)
        if verdict == self.verdict:
            return
        logging.info("engine %d: %s", welcome.incarnation, problem or "healthy")
        self.verdict = verdict
        self._said()

    def _drop_probes(self) -> None:
        for probe in self._probes.values():
            probe.end()
        self._probes.clear()


async def _said(problem: str) -> str:
    return problem


async def _first(stream: Stream) -> str:
    """Until the canary's first sign; the problem, or nothing."""
    try:
        async for output in stream:
            if output.token_ids or (output.finish is not None and output.finish.get("type") != "abort"):
                return ""
    except RequestError as error:
        return f"a canary failed: {error.message}"
    return "a canary was aborted"
