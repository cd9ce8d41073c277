"""Canaries: the smallest real request by the same road as every other, and the verdict that follows from them."""

import asyncio
import logging
from collections.abc import Callable

from shared.config import NodeConfig
from shared.engine_client import EngineClient
from shared.errors import RequestError
from shared.frames import Beat, Verdict
from shared.roles.role import Role

FIRST_SECONDS = 600.0
"""For the first canary of an incarnation: it may compile kernels."""
STRIKES = 2
"""Failures in a row before an engine that was healthy is not."""


class Canary:
    """Sends canaries while an engine is up. ``verdict`` is about the newest incarnation it has judged."""

    def __init__(self, config: NodeConfig, role: Role, client: EngineClient, said: Callable[[], None]) -> None:
        self._config = config
        self._role = role
        self._client = client
        self._said = said
        self._strikes = 0
        self._steps = -1.0
        self.engine: Beat | None = None
        self.verdict: Verdict | None = None

    async def run(self) -> None:
        """For ever: a canary at once for a new incarnation, later only for an engine that makes no steps."""
        while True:
            welcome = self._client.welcome
            if welcome is None:
                await asyncio.sleep(0.05)
                continue
            first = self.verdict is None or self.verdict.incarnation != welcome.incarnation
            if not first:
                await asyncio.sleep(self._config.canary_wait)
                if self._client.welcome is not welcome or self._progressed():
                    continue
            self._progressed()
            problem = await self._probe(FIRST_SECONDS if first else self._config.canary_timeout)
            if self._client.welcome is not welcome:
                continue
            # A long prefill or a full queue may keep a canary waiting while the engine works: that is not a failure.
            if problem and self._progressed():
                problem = ""
            self._judge(welcome.incarnation, problem)

    def _progressed(self) -> bool:
        """True when the engine has made steps since the last look."""
        steps = self.engine.numbers.get("steps", 0.0) if self.engine is not None else 0.0
        before, self._steps = self._steps, steps
        return steps != before

    async def _probe(self, seconds: float) -> str:
        """Send one canary; the problem, or nothing."""
        welcome = self._client.welcome
        assert welcome is not None
        stream = None
        try:
            async with asyncio.timeout(seconds):
                stream = self._client.submit(self._role.canary(welcome.facts))
                async for output in stream:
                    if output.token_ids:
                        stream.abort()
                        return ""
        except TimeoutError:
            if stream is not None:
                stream.abort()
            return f"a canary had no token within {seconds:.0f} s"
        except RequestError as error:
            return f"a canary failed: {error.message}"
        return "a canary ended without a token"

    def _judge(self, incarnation: int, problem: str) -> None:
        self._strikes = self._strikes + 1 if problem else 0
        healthy = self.verdict is not None and self.verdict.incarnation == incarnation and self.verdict.healthy
        if problem and healthy and self._strikes < STRIKES:
            logging.warning("%s (%d of %d)", problem, self._strikes, STRIKES)
            return
        verdict = Verdict(incarnation, not problem, problem)
        if verdict != self.verdict:
            logging.info("engine %d: %s", incarnation, problem or "healthy")
            self.verdict = verdict
            self._said()
