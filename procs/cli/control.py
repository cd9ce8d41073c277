"""`sgnode drain`, `resume`, `stop`, `restart`: what an operator wants of a node that runs."""

import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

from procs.cli.status import GONE, directory_of, document_of, parser_of
from shared import config as configuration
from shared import rolling
from shared.errors import NodeError
from shared.state import State

SIDE = ("relay", "prober", "coordinator", "frontend")
"""Processes that no stream of another depends on; the frontend finishes its own connections."""
SETTLED_SECONDS = 10.0
"""After so long a state is not an old one any more."""
LOAD_SECONDS = 3600.0
"""For an engine to load after a restart: a large model from a slow disk."""


def _say(line: str) -> None:
    print(line, flush=True)


def _patience(directory: Path) -> float:
    """Seconds that a drain of this node may take."""
    config = configuration.load(directory)
    return config.drain_grace + config.drain_timeout


def drained(directory: Path, why: str) -> None:
    """Drain the node and wait until it is. Raises NodeError when that takes longer than it may."""
    rolling.drain(directory, why, _patience(directory), _say)


def drain(argv: list[str]) -> int:
    """Take the node out of discovery and let its streams finish; the engine stays up. 0 when it is drained."""
    made = parser_of("drain", "Leave discovery, let running streams finish (up to --drain-timeout), keep the engine up.")
    made.add_argument("--now", action="store_true", help="end running streams at once; a frontend may continue them elsewhere")
    made.add_argument("--no-wait", action="store_true", help="return at once; `sgnode status` shows how it goes")
    found = made.parse_args(argv)
    directory = directory_of(found)
    if found.no_wait or found.now:
        rolling.want_drain(directory, "drained by `sgnode drain`")
    if found.now:
        rolling.hurry(directory)
    if found.no_wait:
        _say("draining; `sgnode status` shows how it goes, `sgnode resume` takes it back")
        return 0
    try:
        drained(directory, "drained by `sgnode drain`")
    except KeyboardInterrupt:
        _say("the drain goes on; `sgnode resume` takes it back")
        return 130
    _say("drained; `sgnode resume` lets it serve again")
    return 0


def resume(argv: list[str]) -> int:
    """Let a drained or draining node serve again."""
    found = parser_of("resume", "Let a drained or draining node serve again.").parse_args(argv)
    directory = directory_of(found)
    before = rolling.document(directory)["want"]
    rolling.resume(directory)
    _say("serving again as soon as it is registered; see `sgnode status`" if before == "drain" else "it was not drained")
    return 0


def stop(argv: list[str]) -> int:
    """Ask the node to drain and stop, show how it goes, return when it is gone."""
    made = parser_of("stop", "Drain the node and stop it: running streams finish, up to --drain-timeout. 0 when it is gone.")
    made.add_argument("--now", action="store_true", help="end running streams at once; a frontend may continue them elsewhere")
    found = made.parse_args(argv)
    directory = directory_of(found)
    try:
        descriptor = os.pidfd_open(int(document_of(directory)["supervisord_pid"]))
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
    except PermissionError as error:
        raise NodeError(f"the node in {directory} belongs to another user") from error
    except GONE as error:
        raise NodeError(f"no node is running in {directory}") from error
    shown, hurried = "", not found.now
    while not select.select([descriptor], [], [], 0.5 if hurried else 0.05)[0]:
        try:
            status = document_of(directory)
            if not hurried and status["want"] == "stop":
                hurried = rolling.hurry(directory)
        except (*GONE, NodeError):
            continue
        line = str(status["reason"]) if str(status["reason"]).startswith("draining:") else "stopping"
        if line.split(",")[0] != shown:
            shown = line.split(",")[0]
            _say(line)
    _say("stopped")
    return 0


def restart(argv: list[str]) -> int:
    """Restart one process, or all of them behind a drain, without losing a stream. supervisord itself stays."""
    made = parser_of(
        "restart",
        "Restart a process without losing a stream: agents drain one after the other, the engine behind a drained node. "
        "Without PROCESS: all of them behind a drain. supervisord itself restarts with the service only.",
    )
    made.add_argument(
        "process", nargs="?", metavar="PROCESS", help="agent, agent:0, engine, relay, prober, coordinator, frontend"
    )
    found = made.parse_args(argv)
    directory = directory_of(found)
    patience = _patience(directory)
    name: str | None = found.process
    if name == "agent":
        rolling.restart_agents(directory, rolling.agents(directory), patience, _say)
    elif name is not None and name.startswith("agent:"):
        rolling.restart_agents(directory, [name], patience, _say)
    elif name in SIDE:
        rolling.restart(directory, name, patience, _say)
    elif name in (None, "engine", "keeper"):
        _restart_engine(directory, patience, everything=name is None)
    else:
        raise NodeError(f"PROCESS {name!r}: expected one of agent, agent:0 ..., engine, {', '.join(SIDE)}")
    return 0


def _restart_engine(directory: Path, patience: float, *, everything: bool) -> None:
    config, status = configuration.load(directory), rolling.document(directory)
    if not config.leads:
        host, port = config.group_address
        raise NodeError(
            f"rank {config.node_rank} of {config.nnodes}: the engines of a group restart together; type `sgnode restart engine` "
            f"on rank 0 ({host}:{port}). For this node alone: `sgnode restart relay|prober|coordinator`, or stop it and start it "
            "again"
        )
    before, incarnation = status["want"], status["incarnation"]
    if before == "stop":
        raise NodeError("the node is stopping")
    what = "sgnode restart" + ("" if everything else " engine")
    try:
        rolling.drain(directory, f"drained by `{what}`", patience, _say)
        if config.nnodes > 1:
            rolling.restart_group(directory, _say)
        else:
            rolling.restart(directory, "engine", patience, _say)
        if everything:
            present = {row["name"] for row in rolling.document(directory)["processes"]}
            for name in [*(name for name in SIDE if name in present), *rolling.agents(directory)]:
                rolling.restart(directory, name, patience, _say)
    except (NodeError, KeyboardInterrupt):
        print("sgnode: it stays as it is; `sgnode resume` lets it serve again", file=sys.stderr)
        raise
    if before == "drain":
        _say("it was drained before and stays so")
        return
    rolling.resume(directory)
    old_until = time.monotonic() + SETTLED_SECONDS

    def up(status: dict[str, Any]) -> bool:
        # A node that had failed says so until its coordinator has seen the new engine.
        known = status["incarnation"] > incarnation or time.monotonic() > old_until
        if status["state"] == State.FAILED and known:
            raise NodeError(f"failed: {status['reason']}")
        return bool(status["state"] == State.READY and status["incarnation"] > incarnation)

    rolling.until(directory, up, LOAD_SECONDS, "ready", _say)
    _say("ready")
