"""`sgnode status`, `show-config`, `ctl`: looking at a node that runs. None of them imports sglang."""

import argparse
import http.client
import json
import os
import re
import sys
import xmlrpc.client
from collections.abc import Mapping
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
SHORTEST_WATCH, LONGEST_WATCH = 0.1, 3600.0
"""Seconds between the looks of --watch."""
GONE = (OSError, http.client.HTTPException)
"""What a call to a supervisord raises that isn't there, or leaves in mid-answer."""
SECRET = re.compile(r"--(.*-)?(api-key|password|secret|auth-token|access-token)$")
"""Worker flags whose value `show-config` does not print."""


def parser_of(command: str, description: str) -> Parser:
    made = Parser(prog=f"sgnode {command}", description=description, allow_abbrev=False)
    made.add_argument("--name", help="name of the node (default: the only one that runs)")
    made.add_argument("--runtime-dir", type=Path, help="its runtime directory")
    return made


def directory_of(found: argparse.Namespace) -> Path:
    return runtime_dir.find(found.name, found.runtime_dir).absolute()


def document_of(directory: Path) -> dict[str, Any]:
    """The status document. Raises one of GONE when no node answers, NodeError when what answers is not one."""
    try:
        document: dict[str, Any] = json.loads(supervisord.call(directory, "sgnode.node", timeout=5.0))
    except (xmlrpc.client.Error, ValueError) as error:
        raise NodeError(f"{directory}: supervisord answers, but not as a node: {error}") from error
    return document


def status(argv: list[str]) -> int:
    """Print the node's status. 0 ready, 3 not running, 4 otherwise."""
    made = parser_of("status", "Show the node's state, and each process's with what it waits for.")
    made.add_argument("--json", action="store_true", help="as one JSON object")
    made.add_argument(
        "--watch", nargs="?", type=_seconds, const=1.0, metavar="SECONDS", help="again every second, or so many; q ends it"
    )
    found = made.parse_args(argv)
    try:
        directory = directory_of(found)
    except NodeError as error:
        print(error, file=sys.stderr)
        return NOT_RUNNING
    if found.watch is not None:
        from procs.cli.watch import watch

        return watch(directory, found.watch, as_json=found.json)
    try:
        document = document_of(directory)
    except GONE:
        print(f"no node is running in {directory}", file=sys.stderr)
        return NOT_RUNNING
    print(json.dumps(document) if found.json else render(document))
    return code_of(document)


def code_of(document: Mapping[str, Any] | None) -> int:
    """The exit code that a status means; None: no node answers."""
    if document is None:
        return NOT_RUNNING
    return READY if document.get("state") == State.READY else OTHERWISE


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not SHORTEST_WATCH <= seconds <= LONGEST_WATCH:
        raise argparse.ArgumentTypeError(f"expected seconds, {SHORTEST_WATCH:g} to {LONGEST_WATCH:g}, got {text!r}")
    return seconds


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
    found = parser_of("show-config", "Print the configuration that the node runs with, as JSON, without secrets.").parse_args(
        argv
    )
    config = configuration.load(directory_of(found))
    document = msgspec.to_builtins(config)
    document["worker_argv"] = _redacted(config.worker_argv)
    print(json.dumps(document, indent=2))
    return 0


def ctl(argv: list[str]) -> int:
    """Become supervisorctl on the node. Everything after the node's own flags is supervisorctl's."""
    made = parser_of("ctl", "supervisorctl on this node: `sgnode ctl status`, `sgnode ctl tail -f engine`, `sgnode ctl node`.")
    made.add_argument("command", nargs=argparse.REMAINDER, help="what supervisorctl takes; nothing: its prompt")
    found = made.parse_args(argv)
    conf = directory_of(found) / SUPERVISOR_CONF
    if not conf.exists():
        raise NodeError(f"no node is running in {conf.parent}")
    arguments = [sys.executable, "-m", "supervisor.supervisorctl", "-c", str(conf), *found.command]
    sys.stdout.flush()
    os.execv(sys.executable, arguments)
    return 1  # not reached: execv does not return
