"""Restarts that lose no stream: the agents one after the other, each drained; the engine behind a drained node.

Used by `sgnode restart` and by supervisorctl; each step is a call to supervisord, so an interrupted one leaves a node that
`sgnode status` explains.
"""

import http.client
import json
import time
import xmlrpc.client
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared import supervisord
from shared.errors import NodeError
from shared.state import State

AGENT = "agent"
BACK_SECONDS = 120.0
"""For a restarted agent to be in discovery again: Dynamo's import and the tokenizer take seconds."""
DRAIN_MARGIN_SECONDS = 30.0
"""On top of grace and timeout before a drain counts as hanging."""
POLL_SECONDS = 0.1
Say = Callable[[str], Any]


def document(directory: Path) -> dict[str, Any]:
    """The node's status document. Raises NodeError when no node answers."""
    found: dict[str, Any] = json.loads(_call(directory, "sgnode.node"))
    return found


def _call(directory: Path, method: str, *args: Any, timeout: float = 10.0) -> Any:
    try:
        return supervisord.call(directory, method, *args, timeout=timeout)
    except xmlrpc.client.Fault as fault:
        if fault.faultCode == supervisord.SHUTDOWN_STATE:
            raise NodeError("the node is stopping") from fault
        raise NodeError(fault.faultString.partition(": ")[2] or fault.faultString) from fault
    except (OSError, http.client.HTTPException) as error:
        raise NodeError(f"no node is running in {directory}") from error


def _row(status: dict[str, Any], name: str) -> dict[str, Any]:
    return next((row for row in status["processes"] if row["name"] == name), {})


def until(directory: Path, condition: Callable[[dict[str, Any]], bool], seconds: float, what: str, say: Say) -> dict[str, Any]:
    """Poll the status until ``condition``; progress of a drain is said. Raises NodeError past ``seconds``."""
    deadline, said = time.monotonic() + seconds, ""
    while not condition(status := document(directory)):
        progress = _progress(status)
        if progress and progress.partition(",")[0] != said:
            said = progress.partition(",")[0]
            say(progress)
        if time.monotonic() > deadline:
            raise NodeError(f"not within {seconds:.0f} s: {what}; see `sgnode status`")
        time.sleep(POLL_SECONDS)
    return status


def _progress(status: dict[str, Any]) -> str:
    if str(status["reason"]).startswith("draining:"):
        return str(status["reason"])
    return next((str(row["detail"]) for row in status["processes"] if str(row["detail"]).startswith("draining:")), "")


def want_drain(directory: Path, reason: str) -> None:
    """Begin a drain. Raises NodeError."""
    _call(directory, "sgnode.want", "drain", reason)


def drain(directory: Path, reason: str, seconds: float, say: Say) -> None:
    """Drain the node and wait for it. ``seconds``: its drain grace and timeout together. Raises NodeError."""
    want_drain(directory, reason)

    def through(status: dict[str, Any]) -> bool:
        if status["want"] != "drain":
            raise NodeError("the drain was taken back" if status["want"] == "serve" else "the node is stopping")
        if status["state"] == State.DRAINED:
            return True
        if status.get("node_rank"):
            return bool(status["state"] == State.WAITING)  # its streams are the leader's; without an engine it has none
        # A node without a ready engine does not call itself drained, but its agents do.
        agents = [row for row in status["processes"] if row["name"].startswith(AGENT) and row["pid"]]
        return not status["registered"] and not status["inflight"] and all(row["state"] == State.DRAINED for row in agents)

    until(directory, through, seconds + DRAIN_MARGIN_SECONDS, "drained", say)


def resume(directory: Path) -> None:
    """Let the node serve again. Raises NodeError."""
    _call(directory, "sgnode.want", "serve", "")


def restart_group(directory: Path, say: Say) -> None:
    """End the epoch of a group whose rank 0 this is; the next one starts the engines anew. Raises NodeError."""
    _call(directory, "sgnode.restart_engine")
    say("the engines of every rank: restarted")


def hurry(directory: Path) -> bool:
    """End what a drain or a stop still waits for; False when there is none. Raises NodeError."""
    return bool(_call(directory, "sgnode.hurry"))


def agents(directory: Path) -> list[str]:
    """Names of the node's agents. Raises NodeError."""
    return sorted(row["name"] for row in document(directory)["processes"] if row["name"].startswith(f"{AGENT}:"))


def restart_agents(directory: Path, names: list[str], seconds: float, say: Say) -> None:
    """Restart agents one after the other: each leaves discovery, finishes its streams, and is back before the next goes.

    ``seconds``: the node's drain grace and timeout together. Raises NodeError.
    """
    for name in names:
        status = document(directory)
        if status["state"] == State.READY and len(agents(directory)) == 1:
            say("one agent only: until it is back, new requests go to other nodes (--agents 2 avoids that)")
        was_registered = bool((_row(status, name).get("numbers") or {}).get("registered"))
        restart(directory, name, seconds, say)
        if was_registered:

            def back(status: dict[str, Any], name: str = name) -> bool:
                row = _row(status, name)
                # Who serves no longer for another reason (an engine that died meanwhile) is not waited for.
                return bool((row.get("numbers") or {}).get("registered")) or status["state"] not in (State.READY, State.WARMING)

            until(directory, back, BACK_SECONDS, f"{name} registered again", say)


def restart(directory: Path, name: str, seconds: float, say: Say) -> None:
    """Stop one program, wait for its end, start it. ``seconds``: what its stop may take. Raises NodeError."""
    program = "engine" if name in ("engine", "keeper") else name
    row = "keeper" if program == "engine" else name
    old = _row(document(directory), row)
    if not old:
        raise NodeError(f"no process {name!r} here; `sgnode status` lists them")
    if old["pid"]:
        _call(directory, "supervisor.stopProcess", program, False)
        until(directory, lambda status: not _row(status, row)["pid"], seconds + DRAIN_MARGIN_SECONDS, f"{name} stopped", say)
    _call(directory, "supervisor.startProcess", program, False)
    say(f"{name}: restarted")
