"""The sides ``raw`` and ``ceiling`` from outside: benchmarks.token_path.engine in a process of its own."""

import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.token_path import clients
from benchmarks.token_path.drive import Done
from benchmarks.token_path.load import Load
from benchmarks.token_path.side import START_SECONDS, Failed, Place, Setup, Wanted, worker_flags


class EngineSide:
    """See side.Side."""

    def __init__(self, wanted: Wanted, setup: Setup, place: Place) -> None:
        self._wanted, self._setup, self._place = wanted, setup, place
        self._connection: Connection | None = None

    def start(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        self._connection = ours
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.token_path.engine", self._wanted.kind, str(theirs.fileno())]
        with (self._place.logs / "engine.log").open("wb") as out:
            self._process = subprocess.Popen(
                [*command, "--", *worker_flags(self._wanted, self._setup)],
                env=self._place.environment(),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        theirs.close()
        if self._receive(START_SECONDS) != "up":
            raise Failed("the engine's process is out of step")

    def scale(self, agents: int) -> None:
        """It has none."""

    def outputs(self, prompts: list[list[int]], output: int) -> list[str]:
        from transformers import AutoTokenizer

        assert self._connection is not None
        self._connection.send((prompts, output))
        tokenizer = AutoTokenizer.from_pretrained(self._setup.model)
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in self._receive(60.0)]

    def run(self, load: Load, started: Callable[[], None]) -> list[Done]:
        assert self._connection is not None
        return clients.run([self._connection], load, started)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()

    def _receive(self, seconds: float) -> Any:
        assert self._connection is not None
        try:
            if not self._connection.poll(seconds):
                raise Failed(f"the engine's process says nothing for {seconds:g} s")
            return self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise Failed("the engine's process has ended") from error
