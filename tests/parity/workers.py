"""The two sides of a comparison: a worker of either kind behind a frontend of its own, on a file store that both share."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from procs.cli.serve import engine_environment
from tests.frontend import LOOPBACK, Frontend
from tests.harness import ONE_THREAD, SGNODE, Node, marked_pids
from tests.parity.configurations import MODEL, TEMPLATE, Configuration

SIDES = ("incumbent", "sgnode")
READY_SECONDS = 120.0
ENGINE = {**ONE_THREAD, "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
"""Environment of both. A repetition penalty is compiled when one first comes, which takes 15 s here."""


class Models:
    """The tiny models that the configurations need, made at once."""

    def __init__(self, root: Path, archs: set[str]) -> None:
        self._root = root
        self.template = root / "template.jinja"
        self.template.write_text(TEMPLATE)
        commands = [[SGNODE, "demo-model", str(self.of(arch)), "--arch", arch] for arch in archs]
        making = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
        assert not any([process.wait(120) for process in making])

    def of(self, arch: str) -> Path:
        return self._root / arch


@contextlib.contextmanager
def serving(side: str, wanted: Configuration, models: Models) -> Iterator[str]:
    """The address of a frontend with that side's worker behind it. Raises AssertionError with the log when it can't start."""
    arguments = wanted.arguments(str(models.of(wanted.arch)), str(models.template))
    with tempfile.TemporaryDirectory(prefix="parity-", dir="/tmp") as root:
        store = Path(root) / "store"
        with Frontend(store, 0, env=wanted.frontend) as frontend:
            start = _incumbent if side == "incumbent" else _sgnode
            with start(wanted.name, arguments, store):
                frontend.wait_model(MODEL, READY_SECONDS)
                yield frontend.url


@contextlib.contextmanager
def _incumbent(name: str, arguments: list[str], store: Path) -> Iterator[None]:
    marker = store.parent / "incumbent"
    environment = {
        **engine_environment("cpu"),
        **LOOPBACK,
        **ENGINE,
        "DYN_FILE_KV": str(store),
        "HOME": str(store.parent),
        "TMPDIR": str(store.parent),
        "SGNODE_RUNTIME_DIR": str(marker),  # how its processes are found again
    }
    command = [sys.executable, "-W", "ignore", "-m", "dynamo.sglang", *arguments]
    command += ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
    log = store.parent / "incumbent.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    try:
        with _explained(lambda: log.read_text(errors="replace")[-4000:]):
            yield
    finally:
        _kept(log, f"incumbent-{name}")
        # At once: its own way out takes 8 s, and is not compared.
        for pid in marked_pids(marker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(10)


@contextlib.contextmanager
def _sgnode(name: str, arguments: list[str], store: Path) -> Iterator[None]:
    environment = {**LOOPBACK, **ENGINE, "DYN_FILE_KV": str(store)}
    with Node(*arguments, "--no-frontend", name="parity", env=environment) as node:
        try:
            with _explained(lambda: node.logs(8)[-6000:]):
                node.start().wait_ready(READY_SECONDS)
                yield
            node.terminate()
            try:
                node.wait_stopped()
            except subprocess.TimeoutExpired as error:
                # Every answer has come: a drain that waits has lost one.
                raise AssertionError(f"sgnode does not stop: {node.status().get('reason')}") from error
        finally:
            for log in (node.runtime_dir / "log").glob("*.log"):
                _kept(log, f"sgnode-{name}")


@contextlib.contextmanager
def _explained(log: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log()}") from error


def _kept(log: Path, prefix: str) -> None:
    """Copy a log to where PARITY_LOGS says, for a look at what a worker said."""
    if (target := os.environ.get("PARITY_LOGS")) and log.exists():
        Path(target).mkdir(parents=True, exist_ok=True)
        (Path(target) / f"{prefix}-{log.name}").write_bytes(log.read_bytes())
