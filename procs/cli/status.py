"""`sgnode status`, `stop`, `show-config`, `ctl`: commands on a node that runs. None of them imports sglang."""

import argparse
import http.client
import json
import os
import re
import select
import signal
import sys
import xmlrpc.client
from pathlib import Path
from typing import Any

import msgspec

from procs.cli import runtime_dir
from procs.cli.flags import Parser
from shared import config as configuration
from shared import supervisord
from shared.config import SUPERVISOR_CONF
from shared.errors import NodeError
from shared.state import State
from shared.table import render

READY, NOT_RUNNING, OTHERWISE = 0, 3, 4
"""Exit codes of `sgnode status`."""
GONE = (OSError, http.client.HTTPException)
"""What a call to a supervisord raises that isn't there, or leaves in mid-answer."""
SECRET = re.compile(r"--(.*-)?(api-key|password|secret|auth-token|access-token)$")
"""Worker flags whose value `show-config` does not print."""


def _parser(command: str, description: str) -> Parser:
    made = Parser(prog=f"sgnode {command}", description=description, allow_abbrev=False)
    made.add_argument("--name", help="name of the node (default: the only one that runs)")
    made.add_argument("--runtime-dir", type=Path, help="its runtime directory")
    return made


def _directory(found: argparse.Namespace) -> Path:
    return runtime_dir.find(found.name, found.runtime_dir).absolute()


def _document(directory: Path) -> dict[str, Any]:
    """The status document. Raises one of GONE when no node answers, NodeError when what answers is not one."""
    try:
        document: dict[str, Any] = json.loads(supervisord.call(directory, "sgnode.node", timeout=5.0))
    except (xmlrpc.client.Error, ValueError) as error:
        raise NodeError(f"{directory}: supervisord answers, but not as a node: {error}") from error
    return document


def status(argv: list[str]) -> int:
    """Print the node's status. 0 ready, 3 not running, 4 otherwise."""
    made = _parser("status", "Show the node's state, and each process's with what it waits for.")
    made.add_argument("--json", action="store_true", help="as one JSON object")
    found = made.parse_args(argv)
    try:
        directory = _directory(found)
    except NodeError as error:
        print(error, file=sys.stderr)
        return NOT_RUNNING
    try:
        document = _document(directory)
    except GONE:
        print(f"no node is running in {directory}", file=sys.stderr)
        return NOT_RUNNING
    print(json.dumps(document) if found.json else render(document))
    return READY if document.get("state") == State.READY else OTHERWISE


def stop(argv: list[str]) -> int:
    """Ask the node to drain and stop, show how it goes, return when it is gone."""
    made = _parser("stop", "Drain the node and stop it: running streams finish, up to --drain-timeout. 0 when it is gone.")
    made.add_argument("--now", action="store_true", help="end running streams at once; a frontend may continue them elsewhere")
    found = made.parse_args(argv)
    directory = _directory(found)
    try:
        descriptor = os.pidfd_open(int(_document(directory)["supervisord_pid"]))
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
    except PermissionError as error:
        raise NodeError(f"the node in {directory} belongs to another user") from error
    except GONE as error:
        raise NodeError(f"no node is running in {directory}") from error
    shown, hurried = "", False
    while not select.select([descriptor], [], [], 0.1 if found.now and not hurried else 0.5)[0]:
        try:
            rows = _document(directory)["processes"]
        except GONE:
            continue
        draining = [row for row in rows if str(row["detail"]).startswith("draining:")]
        if found.now and draining and not hurried:
            hurried = True
            _hurry(descriptor, draining)
        line = draining[0]["detail"] if draining else "stopping"
        if line.split(",")[0] != shown:
            shown = line.split(",")[0]
            print(line, flush=True)
    print("stopped", flush=True)
    return 0


def _hurry(supervisord_fd: int, draining: list[dict[str, Any]]) -> None:
    """A second SIGTERM, to supervisord and to the agents: supervisor 4.3 does not pass one on while it stops."""
    try:
        signal.pidfd_send_signal(supervisord_fd, signal.SIGTERM)
        for row in draining:
            if row["pid"]:
                os.kill(row["pid"], signal.SIGTERM)
    except ProcessLookupError:
        return


def _redacted(argv: list[str]) -> list[str]:
    """Arguments with the secrets' values hidden."""
    shown: list[str] = []
    for argument in argv:
        flag, equals, _value = argument.partition("=")
        if shown and SECRET.match(shown[-1]):
            shown.append("***")
        elif equals and SECRET.match(flag):
            shown.append(f"{flag}=***")
        else:
            shown.append(argument)
    return shown


def show_config(argv: list[str]) -> int:
    """Print the resolved configuration."""
    found = _parser("show-config", "Print the configuration that the node runs with, as JSON, without secrets.").parse_args(argv)
    config = configuration.load(_directory(found))
    document = msgspec.to_builtins(config)
    document["worker_argv"] = _redacted(config.worker_argv)
    print(json.dumps(document, indent=2))
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
