"""The sides of ``side.ALONE`` from outside: benchmarks.token_path.engine in one process, told which it is."""

import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tokenizers import Tokenizer

from benchmarks.token_path import clients
from benchmarks.token_path.drive import Done
from benchmarks.token_path.load import Load
from benchmarks.token_path.side import START_SECONDS, Failed, Place, Setup, Wanted, worker_flags


class EngineSide:
    """See side.Side."""

    def __init__(self, wanted: Wanted, setup: Setup, place: Place) -> None:
        self._wanted, self._setup, self._place = wanted, setup, place
        self._connection: Connection | None = None
        self._outputs: dict[str, list[list[int]]] = {}

    def start(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        self._connection = ours
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.token_path.engine", str(theirs.fileno())]
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

    def become(self, wanted: Wanted) -> None:
        self._wanted = wanted

    def scale(self, agents: int) -> None:
        """It has none."""

    def outputs(self, prompts: list[list[int]], output: int) -> list[str]:
        assert self._connection is not None
        if not self._outputs:
            self._connection.send((prompts, output))
            self._outputs = self._receive(60.0)
        tokenizer = Tokenizer.from_file(str(self._setup.model / "tokenizer.json"))
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in self._outputs[self._wanted.kind]]

    def run(self, load: Load, started: Callable[[], None]) -> list[Done]:
        assert self._connection is not None
        self._connection.send(self._wanted.kind)
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
