"""A real node for tests and benchmarks: started by ``sgnode serve``, found by a marker, stopped, and proven gone.

Every program of a node has SGNODE_RUNTIME_DIR in its environment: that is the marker.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from procs.cli.status import GONE, document_of
from shared.errors import NodeError

SGNODE = str(Path(sys.executable).with_name("sgnode"))
CPU = ["--max-total-tokens", "65536"]
"""On top of `sgnode serve`'s own defaults for a host without a GPU."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Environment of engines that share the host's cores: with two threads each, all spinning, they make a tenth of the tokens."""
TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", **ONE_THREAD}
"""Environment of two ranks: SGLang wants a NUMA node for each on a CPU, or to be told the cores."""


class Deadline(AssertionError):
    """A condition did not come true in time."""


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 30.0, every: float = 0.02) -> Any:
    """Poll until the condition is true and return its value. Raises Deadline naming ``what``."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise Deadline(f"not within {seconds} s: {what}")
        time.sleep(every)


def model_cards(store: Path) -> list[tuple[str, dict[str, Any]]]:
    """Model cards of a file store, each with its key's last part. Dynamo rewrites a card in place: half-written, read again."""

    def read() -> list[list[tuple[str, dict[str, Any]]]]:
        files = [path for path in (store / "v1" / "mdc").rglob("*") if path.is_file()]
        try:
            return [[(unquote(path.name), json.loads(path.read_text())) for path in files]]
        except (ValueError, FileNotFoundError):
            return []

    found: list[tuple[str, dict[str, Any]]] = wait_for(f"whole model cards in {store}", read, 5)[0]
    return found


def marked_pids(runtime_dir: Path) -> list[int]:
    """Processes, zombies aside, whose environment names this runtime directory."""
    marker = f"SGNODE_RUNTIME_DIR={runtime_dir}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if marker in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def instances(node: "Node", store: Path | None = None) -> list[Path]:
    """The workers that a file discovery holds, ``store`` or the node's own: one file each, for the generate endpoint."""
    root = (store or node.runtime_dir / "discovery") / "v1" / "instances"
    return [path for path in root.rglob("*") if path.is_file() and "generate" in str(path)] if root.is_dir() else []


def process_state(pid: int) -> str:
    """proc(5)'s letter: R, S, D, T, Z; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def gone(pid: int) -> bool:
    """True when the process has ended (a zombie has)."""
    return process_state(pid) in ("", "Z")


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal and prove what it does: SIGKILL ends the process, SIGSTOP stops it, SIGCONT lets it go on."""
    os.kill(pid, number)
    if number == signal.SIGKILL:
        wait_for(f"{pid} dead", lambda: gone(pid), 5, every=0.002)
    elif number in (signal.SIGSTOP, signal.SIGCONT):
        wait_for(f"{pid} {number.name}", lambda: (process_state(pid) == "T") == (number == signal.SIGSTOP), 5, every=0.002)


class Node:
    """One node in a runtime directory of its own (short path: unix sockets end at 107 bytes)."""

    def __init__(self, *arguments: str, name: str = "test", env: dict[str, str] | None = None) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="sgn-", dir="/tmp"))
        self.runtime_dir = self.root / "run"
        self.name = name
        self.arguments = list(arguments)
        # Importing dynamo.sglang, as some tests do, sets how SGLang's processes log.
        outside = {name: value for name, value in os.environ.items() if name != "SGLANG_LOGGING_CONFIG_PATH"}
        self.environment = {**outside, "HF_HUB_OFFLINE": "1", "HOME": str(self.root), **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self.console = self.root / "console"
        self.address = "127.0.0.1"
        """Where its HTTP ports are reached from here."""
        self.program = [SGNODE]
        """What is run as `sgnode`; another virtual environment's, in a test of upgrades."""

    # --- life --------------------------------------------------------------------------------------------------------

    def command(self) -> list[str]:
        where = ["--name", self.name, "--runtime-dir", str(self.runtime_dir)]
        ports = [] if "--http-port" in self.arguments else ["--http-port", "0"]
        ports += [] if "--system-port" in self.arguments else ["--system-port", "0"]
        return [*self.program, "serve", *self.arguments, *where, *ports]

    def start(self, *, group: bool = False) -> "Node":
        """``group``: in a process group of its own, as a shell's job has."""
        with self.console.open("wb") as out:
            self.process = subprocess.Popen(
                self.command(),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                process_group=0 if group else None,
            )
        return self

    def wait_ready(self, seconds: float = 120.0) -> "Node":
        def ready() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"sgnode serve ended with {self.process.returncode}\n{self.logs()}")
            return bool(self.status().get("state") == "ready")

        try:
            wait_for("node ready", ready, seconds, every=0.1)
        except Deadline as error:
            raise AssertionError(f"{error}\n{json.dumps(self.status(), indent=1)}\n{self.logs()}") from error
        # Its own frontend is another process, which learns of the registration by itself.
        wait_for("the frontend has the model", self._listed, 30)
        return self

    def _listed(self) -> bool:
        port = self.status().get("ports", {}).get("http")
        if not port:
            return True
        try:
            with urllib.request.urlopen(f"http://{self.address}:{port}/v1/models", timeout=5) as answer:
                return bool(json.load(answer)["data"])
        except OSError:
            return False

    def terminate(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def wait_stopped(self, seconds: float = 30.0) -> int:
        assert self.process is not None
        return self.process.wait(seconds)

    def close(self) -> None:
        """End whatever is left, by marker, and remove the directory."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        for _ in range(5):
            for pid in marked_pids(self.runtime_dir):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        shutil.rmtree(self.root, ignore_errors=True)

    def __enter__(self) -> "Node":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # --- what it says ------------------------------------------------------------------------------------------------

    def sgnode_command(self, *arguments: str) -> list[str]:
        return [*self.program, arguments[0], "--runtime-dir", str(self.runtime_dir), *arguments[1:]]

    @staticmethod
    def tool(name: str) -> str:
        """Another script of the virtual environment."""
        return str(Path(SGNODE).with_name(name))

    def sgnode(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another sgnode command on this node."""
        command = self.sgnode_command(*arguments)
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)

    def status(self) -> dict[str, Any]:
        """The status document, {} while there is none. Asked as `sgnode status --json` does, without a process for each look."""
        try:
            return document_of(self.runtime_dir)
        except (*GONE, NodeError):
            return {}

    def process_row(self, name: str) -> dict[str, Any]:
        return next((row for row in self.status().get("processes", []) if row["name"] == name), {})

    def pid(self, name: str) -> int:
        return int(self.process_row(name).get("pid") or 0)

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.status()['ports']['http']}"

    @property
    def system_url(self) -> str:
        return f"http://{self.address}:{self.status()['ports']['system']}"

    def logs(self, lines: int = 25) -> str:
        """The end of every log, for a failing test's message."""
        texts = []
        for path in [self.console, *sorted((self.runtime_dir / "log").glob("*.log"))]:
            if path.exists():
                tail = [line[:300] for line in path.read_text(errors="replace").splitlines()[-lines:]]
                texts.append(f"--- {path.name}\n" + "\n".join(tail))
        return "\n".join(texts)


def running(node: Node, count: int) -> None:
    """Wait until the engine says that it runs so many requests."""
    wait_for(f"{count} streams in the engine", lambda: node.status().get("inflight") == count, 30)


def nothing_left(node: Node) -> None:
    """Of a stopped node: no process within 5 s, no file but its logs."""
    wait_for("no process left", lambda: not marked_pids(node.runtime_dir), 5)
    left = [p.relative_to(node.runtime_dir) for p in node.runtime_dir.rglob("*") if not p.is_dir()]
    assert all(path.parts[0] == "log" for path in left), left
