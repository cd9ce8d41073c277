"""What sides behind a Dynamo frontend share: when they are up, their outputs, their clients."""

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from benchmarks.token_path.clients import Clients
from benchmarks.token_path.drive import Done
from benchmarks.token_path.load import Load, prompt
from benchmarks.token_path.side import MODEL, START_SECONDS, Failed, Place, Setup, Wanted

POLL_SECONDS = 0.05


def free_port() -> int:
    """A port of the loopback address that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class HttpSide:
    """See side.Side; the side itself says what to start (``_launch``)."""

    def __init__(self, wanted: Wanted, setup: Setup, place: Place) -> None:
        self._wanted, self._setup, self._place = wanted, setup, place
        self._port = free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._clients: Clients | None = None

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def _launch(self) -> None:
        raise NotImplementedError

    def start(self) -> None:
        self._launch()
        # While the engine loads: the clients import theirs.
        self._clients = Clients(self._setup.clients, self._url, MODEL)
        self._wait("the model is listed", self._listed)
        self._wait("a request is answered", lambda: self._answers(1))

    def become(self, wanted: Wanted) -> None:
        """It is one side only."""

    def scale(self, agents: int) -> None:
        """It has no agents."""

    def outputs(self, prompts: list[list[int]], output: int) -> list[str]:
        return [str(self._complete(ids, output)["choices"][0]["text"]) for ids in prompts]

    def run(self, load: Load, started: Callable[[], None]) -> list[Done]:
        assert self._clients is not None
        return self._clients.run(load, started)

    def close(self) -> None:
        if self._clients is not None:
            self._clients.close()
        for process in self._processes.values():
            process.kill()
            process.wait()

    def _spawn(self, name: str, command: list[str], **environment: str) -> None:
        with (self._place.logs / f"{name}.log").open("wb") as out:
            self._processes[name] = subprocess.Popen(
                command,
                env=self._place.environment(**environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def _wait(self, what: str, condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        """Raises Failed after so many seconds, or when a process has ended."""
        until = time.monotonic() + seconds
        while not condition():
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise Failed(f"{name} has ended with {process.returncode}")
            if time.monotonic() > until:
                raise Failed(f"not within {seconds:g} s: {what}")
            time.sleep(POLL_SECONDS)

    def _listed(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/v1/models", timeout=5) as answer:
                return MODEL in [entry["id"] for entry in json.load(answer)["data"]]
        except OSError:
            return False

    def _answers(self, times: int) -> bool:
        """So many requests in a row are answered: more than the frontend's list of instances is long."""
        try:
            for number in range(times):
                self._complete(prompt(number, 8, 256), 1)
        except OSError:
            return False
        return True

    def _complete(self, ids: list[int], output: int) -> dict[str, Any]:
        """A whole completion. Raises OSError."""
        body = {"model": MODEL, "prompt": ids, "max_tokens": output, "temperature": 0, "ignore_eos": True}
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{self._url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
