"""The sides ``sgnode`` and ``synthetic``: a whole node by ``sgnode serve``, its agents stopped one by one to scale down."""

import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.token_path.http_side import HttpSide
from benchmarks.token_path.side import MODEL, Failed, worker_flags
from shared.config import DISCOVERY_DIR, LOG_DIR

SGNODE = [sys.executable, "-W", "ignore", "-m", "procs.cli"]
DRAIN_GRACE = "0.2"
"""Seconds; nothing runs when an agent is stopped here."""
SCALE_SECONDS = 60.0


class NodeSide(HttpSide):
    """See side.Side."""

    @property
    def _runtime_dir(self) -> Path:
        return self._place.root / "run"

    def _launch(self) -> None:
        flags = worker_flags(self._wanted, self._setup)
        if self._wanted.kind == "synthetic":
            dials = f"load_seconds=0,step_seconds={self._setup.step_seconds:g},vocab_size={self._setup.vocab}"
            flags = ["--model-path", str(self._setup.model), "--served-model-name", MODEL, "--synthetic", dials]
        where = ["--name", "token-path", "--runtime-dir", str(self._runtime_dir)]
        ports = ["--http-port", str(self._port), "--system-port", "0"]
        node = ["--agents", str(self._setup.agents), "--drain-grace", DRAIN_GRACE, "--no-console"]
        self._spawn("node", [*SGNODE, "serve", *flags, *where, *ports, *node])
        self._agents = self._setup.agents

    def start(self) -> None:
        super().start()
        self._settled()

    def scale(self, agents: int) -> None:
        """Stop the agents above that number, and see that the frontend has none of them. Raises Failed."""
        for index in range(agents, self._agents):
            command = [*SGNODE, "ctl", "--runtime-dir", str(self._runtime_dir), "stop", f"agent:{index}"]
            done = subprocess.run(
                command, env=self._place.environment(), capture_output=True, text=True, timeout=SCALE_SECONDS, check=False
            )
            if done.returncode:
                raise Failed(f"agent:{index} does not stop: {done.stdout.strip()} {done.stderr.strip()}")
        self._agents = agents
        self._settled()

    def close(self) -> None:
        super().close()
        for log in (self._runtime_dir / LOG_DIR).glob("*.log"):
            shutil.copy(log, self._place.logs)

    def _settled(self) -> None:
        """Discovery has exactly the agents that run, and each of them answers."""
        self._wait(f"{self._agents} agents in discovery", lambda: self._instances() == self._agents, SCALE_SECONDS)
        self._wait("the agents answer", lambda: self._answers(2 * self._setup.agents), SCALE_SECONDS)

    def _instances(self) -> int:
        """How many workers the node's own file store has: a file each, for the generate endpoint."""
        root = self._runtime_dir / DISCOVERY_DIR / "v1" / "instances"
        return sum(1 for path in root.rglob("*") if path.is_file() and "generate" in str(path)) if root.is_dir() else 0
