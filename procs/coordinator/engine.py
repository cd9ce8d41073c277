"""The life of the program ``engine`` under supervisord: when it is started, and when no more (pure, but for its log lines)."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from procs.coordinator.node import ALIVE
from procs.coordinator.restart import LOOP_DEATHS, LOOP_SECONDS, RestartPolicy
from shared.config import LEFT_BEHIND_EXIT

LEFT_BEHIND_SECONDS = 60.0
"""To the next look whether what an earlier engine left is gone: then the node goes on by itself."""


@dataclass
class EngineProgram:
    """Fed with supervisord's process info, says whether to start the engine now. Times: seconds of one monotonic clock."""

    policy: RestartPolicy
    on_death: Callable[[str], None] = lambda why: None
    """Called once for each death, with its reason, before the next start is due."""
    state: str = ""
    started: bool = False
    failed: str = ""
    restart_at: float | None = None
    _wanted: str = ""
    """Why it is being ended on purpose."""
    _pid: int = 0
    _ours: bool = False
    _stopped: bool = False

    def look(self, info: dict[str, Any], now: float, death: str) -> bool:
        """Take ``supervisor.getProcessInfo``'s answer. True when the engine should be started, conditions permitting.

        ``death``: what is known about why it died, for the words of a final failure.
        """
        self.state = str(info["statename"])
        self.started = bool(info["start"])
        if self.state in ALIVE:
            if info["pid"] != self._pid:
                self._new_life(int(info["pid"]), now)
            return False
        if self.state == "STOPPED":
            # Stopped by a person, who starts it again; or never started, which is for us.
            self._pid, self._stopped = 0, self.started
            if self.started:
                self.restart_at = None
                return False
            return not self.failed and (self.restart_at is None or now >= self.restart_at)
        if self.restart_at is None and not self.failed:
            if info.get("exitstatus") == LEFT_BEHIND_EXIT:
                self._cannot_start("processes of an engine before can't be killed; log/engine.log names them")
                self.restart_at = now + LEFT_BEHIND_SECONDS
            elif self._wanted:
                self._pid, self.restart_at = 0, now
                logging.info("the engine was ended: %s", self._wanted)
            else:
                self._died(now, death or str(info.get("spawnerr") or f"the keeper exited with code {info.get('exitstatus')}"))
        return self.restart_at is not None and now >= self.restart_at

    def starting(self) -> None:
        """We are about to start it. One that is dead at the next look has died once more."""
        self._ours, self.restart_at = True, None

    def not_started(self, why: str, now: float) -> None:
        """supervisord could not start it: as a death, so that it is not tried without a pause."""
        self._ours = False
        self._died(now, f"it could not be started: {why}")

    def ending(self, why: str) -> None:
        """Its next end is wanted: not a death."""
        self._wanted = self._wanted or why

    def again(self, now: float) -> None:
        """A person wants it to be started: nothing that was before counts."""
        self.policy.reset()
        self.failed = ""
        if self.state not in ALIVE:
            self.restart_at = now

    def _new_life(self, pid: int, now: float) -> None:
        early = self._stopped or bool(self.failed) or (self.restart_at is not None and now < self.restart_at)
        # Another pid where one was alive: stopped and started between two looks, for nobody restarts the engine but us.
        if not self._ours and (self._pid or early):
            logging.info("the engine was started by hand: earlier deaths are forgotten")
            self.policy.reset()
        self._pid, self._ours, self._stopped, self.failed, self.restart_at, self._wanted = pid, False, False, "", None, ""

    def _died(self, now: float, why: str) -> None:
        self._pid = 0
        delay = self.policy.died(now)
        if delay is None:
            self._cannot_start(
                f"crash loop: {LOOP_DEATHS} deaths of the engine within {LOOP_SECONDS / 60:.0f} min; the last: {why}"
            )
        else:
            self.restart_at = now + delay
            logging.warning("the engine died (%s), %s", why, self.policy.words(delay))
        self.on_death(why)

    def _cannot_start(self, why: str) -> None:
        self.failed = why
        logging.error("%s", why)
