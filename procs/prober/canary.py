"""Canaries: the smallest real request by the same road as every other, and the verdict that follows from them."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from shared.config import NodeConfig
from shared.engine_client import EngineClient
from shared.errors import RequestError
from shared.frames import Beat, Verdict, Welcome
from shared.roles.role import Role
from shared.state import State

FIRST_SECONDS = 600.0
"""For the first canary of an incarnation: it may compile kernels."""
STRIKES = 2
"""Failures in a row before an engine that was healthy is not."""
OWN_STEPS = 2
"""Engine steps that a canary itself makes at most: so few in a whole interval still mean an idle engine."""


class Canary:
    """Sends canaries while an engine is up. ``verdict`` is about the newest incarnation it has judged."""

    def __init__(self, config: NodeConfig, role: Role, client: EngineClient, said: Callable[[], None]) -> None:
        self._config = config
        self._role = role
        self._client = client
        self._client.on_change = self._wake
        self._said = said
        self._strikes = 0
        self._changed = asyncio.Event()
        self._stopped = ""
        self._resting = False
        self.engine: Beat | None = None
        self.verdict: Verdict | None = None

    def _wake(self) -> None:
        self._changed.set()

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

    async def run(self) -> None:
        """For ever: a canary at once for a new incarnation, later only for an engine that makes no steps."""
        judged: Welcome | None = None
        while True:
            self._changed.clear()
            welcome = self._client.welcome
            if welcome is None or self._resting:
                judged = None
                await self._changed.wait()
                continue
            if self._stopped:
                # No canary proves more than this does, and it would wait for its whole timeout.
                self._judge(welcome.incarnation, self._stopped, certain=True)
                judged = None
                await self._changed.wait()
                continue
            if welcome is judged:
                before = self._steps
                if await self._disturbed(self._config.canary_wait) or self._steps - before > OWN_STEPS:
                    continue
            before = self._steps
            problem = await self._unless_disturbed(welcome, self._probe(welcome, self._patience(welcome)))
            if problem is None:
                continue
            judged = welcome
            if problem and self._steps - before > OWN_STEPS:
                # A long prefill or a full queue may keep a canary waiting while the engine works: that proves nothing.
                logging.info("%s, but the engine works", problem)
                continue
            self._judge(welcome.incarnation, problem)

    def _patience(self, welcome: Welcome) -> float:
        """Seconds for a canary: an incarnation's first one may compile kernels."""
        known = self.verdict is not None and self.verdict.incarnation == welcome.incarnation
        return self._config.canary_timeout if known else FIRST_SECONDS

    async def _unless_disturbed(self, welcome: Welcome, probing: Coroutine[Any, Any, str]) -> str | None:
        """The canary's problem, or nothing; None when the engine went or was stopped meanwhile."""
        probe = asyncio.ensure_future(probing)
        try:
            while not probe.done():
                self._changed.clear()
                if self._stopped or self._resting or self._client.welcome is not welcome:
                    return None
                waking = asyncio.ensure_future(self._changed.wait())
                await asyncio.wait({probe, waking}, return_when=asyncio.FIRST_COMPLETED)
                waking.cancel()
            return None if self._client.welcome is not welcome else probe.result()
        finally:
            probe.cancel()

    @property
    def _steps(self) -> float:
        return self.engine.numbers.get("steps", 0.0) if self.engine is not None else 0.0

    async def _disturbed(self, seconds: float) -> bool:
        """Wait; True when the engine came or went meanwhile."""
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def _probe(self, welcome: Welcome, seconds: float) -> str:
        """Send one canary; the problem, or nothing."""
        stream = None
        try:
            async with asyncio.timeout(seconds):
                stream = self._client.submit(self._role.canary(welcome.facts))
                async for output in stream:
                    if output.token_ids or (output.finish is not None and output.finish.get("type") != "abort"):
                        return ""
        except TimeoutError:
            return f"a canary had no token within {seconds:.0f} s"
        except RequestError as error:
            return f"a canary failed: {error.message}"
        finally:
            if stream is not None:
                stream.abort()
        return "a canary was aborted"

    def _judge(self, incarnation: int, problem: str, *, certain: bool = False) -> None:
        self._strikes = self._strikes + 1 if problem else 0
        healthy = self.verdict is not None and self.verdict.incarnation == incarnation and self.verdict.healthy
        if problem and healthy and not certain and self._strikes < STRIKES:
            logging.warning("%s (%d of %d)", problem, self._strikes, STRIKES)
            return
        verdict = Verdict(incarnation, not problem, problem)
        if verdict != self.verdict:
            logging.info("engine %d: %s", incarnation, problem or "healthy")
            self.verdict = verdict
            self._said()
