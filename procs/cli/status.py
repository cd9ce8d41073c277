"""`sgnode status`, `stop`, `show-config`, `ctl`: commands on a node that runs. None of them imports sglang."""

import argparse
import http.client
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from procs.cli import runtime_dir
from procs.cli.flags import Parser
from shared import config as configuration
from shared import supervisord
from shared.config import CONFIG_FILE, SUPERVISOR_CONF
from shared.errors import NodeError
from shared.state import State
from shared.table import render

READY, NOT_RUNNING, OTHERWISE = 0, 3, 4
"""Exit codes of `sgnode status`."""


def _parser(command: str, description: str) -> Parser:
    made = Parser(prog=f"sgnode {command}", description=description, allow_abbrev=False)
    made.add_argument("--name", help="name of the node (default: the only one that runs)")
    made.add_argument("--runtime-dir", type=Path, help="its runtime directory")
    return made


def _directory(found: argparse.Namespace) -> Path:
    return runtime_dir.find(found.name, found.runtime_dir).absolute()


def _document(directory: Path) -> dict[str, Any]:
    """The status document. Raises OSError or HTTPException when no node answers."""
    document: dict[str, Any] = json.loads(supervisord.call(directory, "sgnode.node", timeout=5.0))
    return document


def status(argv: list[str]) -> int:
    """Print the node's status. 0 ready, 3 not running, 4 otherwise."""
    made = _parser("status", "Show the node's state, and each process's with what it waits for.")
    made.add_argument("--json", action="store_true", help="as one JSON object")
    found = made.parse_args(argv)
    try:
        directory = _directory(found)
        document = _document(directory)
    except NodeError as error:
        print(error, file=sys.stderr)
        return NOT_RUNNING
    except (OSError, http.client.HTTPException):
        print(f"no node is running in {directory}", file=sys.stderr)
        return NOT_RUNNING
    print(json.dumps(document) if found.json else render(document))
    return READY if document.get("state") == State.READY else OTHERWISE


def stop(argv: list[str]) -> int:
    """Ask the node to drain and stop, show how it goes, return when it is gone."""
    made = _parser("stop", "Drain the node and stop it: running streams finish, up to --drain-timeout. 0 when it is gone.")
    made.parse_args(argv)
    found = made.parse_args(argv)
    directory = _directory(found)
    try:
        pid = int(_document(directory)["supervisord_pid"])
        descriptor = os.pidfd_open(pid)
    except (OSError, http.client.HTTPException) as error:
        raise NodeError(f"no node is running in {directory}") from error
    signal.pidfd_send_signal(descriptor, signal.SIGTERM)
    import select

    shown = ""
    while not select.select([descriptor], [], [], 0.5)[0]:
        try:
            rows = _document(directory)["processes"]
        except (OSError, http.client.HTTPException, ValueError):
            continue
        line = next((row["detail"] for row in rows if str(row["detail"]).startswith("draining:")), "stopping")
        if line.split(",")[0] != shown:
            shown = line.split(",")[0]
            print(line, flush=True)
    # supervisord removes its files as it ends; the lock goes with it.
    end = time.monotonic() + 5
    while runtime_dir.running(directory) and time.monotonic() < end:
        time.sleep(0.02)
    print("stopped", flush=True)
    return 0


def show_config(argv: list[str]) -> int:
    """Print the resolved configuration."""
    found = _parser("show-config", "Print the configuration that the node runs with, as JSON.").parse_args(argv)
    directory = _directory(found)
    configuration.load(directory)
    print((directory / CONFIG_FILE).read_text())
    return 0


def ctl(argv: list[str]) -> int:
    """Become supervisorctl on the node. Everything after the node's own flags is supervisorctl's."""
    made = _parser("ctl", "supervisorctl on this node: `sgnode ctl status`, `sgnode ctl tail -f engine`, `sgnode ctl node`.")
    made.add_argument("command", nargs=argparse.REMAINDER, help="what supervisorctl takes; nothing: its prompt")
    found = made.parse_args(argv)
    conf = _directory(found) / SUPERVISOR_CONF
    if not conf.exists():
        raise NodeError(f"no node is running in {conf.parent}")
    arguments = [sys.executable, "-m", "supervisor.supervisorctl", "-c", str(conf), *found.command]
    sys.stdout.flush()
    os.execv(sys.executable, arguments)
    return 1  # not reached: execv does not return
