"""A relay alone: the real process, with the engine's and the coordinator's beats played."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from procs import launch
from shared import config as configuration
from shared import kv_sources
from shared.config import Dynamo, NodeConfig
from shared.heart import Heart
from shared.kv_sources import KvSource, KvSources
from shared.state import State
from tests.frontend import LOOPBACK
from tests.harness import send
from tests.kv_player import Player


class Follower:
    """The real relay of rank 1 of 2, which has DP rank 1 and no agent; ``workers`` are the leader's.

    ``before``: a command that is put before the relay's, as taskset.
    """

    def __init__(self, directory: Path, store: Path, block_size: int, before: tuple[str, ...] = ()) -> None:
        self._block_size = block_size
        self._command = [*before, sys.executable, "-m", "procs.relay"]
        for name in ("sock", "log"):
            (directory / name).mkdir(parents=True)
        config = NodeConfig(
            name="f", runtime_dir=str(directory), version="0", role="aggregated", model_path="m", served_model_name="m",
            nnodes=2, node_rank=1, dp_size=2, dynamo=Dynamo(use_kv_events=True),
        )  # fmt: skip
        configuration.save(config)
        outside = {**os.environ, **LOOPBACK, "DYN_FILE_KV": str(store), "HOME": str(directory)}
        self._environ = launch.environment("relay", outside, config)
        self.hearts = [Heart(directory, "engine", incarnation=1), Heart(directory, "coordinator")]
        self.log = directory / "log" / "relay.log"
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.relay = subprocess.Popen(self._command, env=self._environ, stdout=out, stderr=out)

    def kill(self) -> None:
        send(self.relay.pid, signal.SIGKILL)
        self.relay.wait(5)

    def say(self, player: Player, workers: set[int]) -> None:
        engine, coordinator = self.hearts
        engine.set(State.READY, info=kv_sources.say(KvSources(self._block_size, {1: KvSource(player.events, player.replay)})))
        coordinator.set(State.READY, info={"workers": ",".join(map(str, workers))})

    def close(self) -> None:
        self.kill()
        for heart in self.hearts:
            heart.close()
