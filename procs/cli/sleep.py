"""`sgnode sleep`, `sgnode wake`: release the accelerator's memory of a drained node, and serve again."""

import argparse
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from procs.cli.control import drained
from procs.cli.status import directory_of, parser_of
from shared import config as configuration
from shared import rolling
from shared.errors import NodeError
from shared.state import State

CONTROL_SECONDS = 600.0
"""For the engine to give its memory back, or to take it again."""
READY_SECONDS = 120.0
SLEEPLESS = ("image", "video", "mm_encode")
"""Roles whose engine has no call that releases its memory."""


def sleep(argv: list[str]) -> int:
    """Drain the node and release its memory; processes and model card stay. 0 when it is asleep."""
    made = parser_of("sleep", "Drain the node, then release its accelerator memory; the processes stay. `sgnode wake` undoes it.")
    directory = _directory(made, argv)
    role = configuration.load(directory).role
    if role in SLEEPLESS:
        raise NodeError(f"sleep: the engine of a node of role {role} can't release its memory; `sgnode stop` does")
    if _state(directory) == State.SLEEPING:
        print("it is asleep already; `sgnode wake` wakes it")
        return 0
    drained(directory, "asleep by `sgnode sleep`")
    _ask(directory, "release_memory_occupation")
    rolling.until(directory, lambda status: status["state"] == State.SLEEPING, READY_SECONDS, "asleep", _say)
    print("asleep; `sgnode wake` takes the memory again and serves")
    return 0


def wake(argv: list[str]) -> int:
    """Take the memory again and serve. 0 when it is ready."""
    made = parser_of("wake", "Take the accelerator memory again and serve.")
    directory = _directory(made, argv)
    if _state(directory) == State.SLEEPING:
        _ask(directory, "resume_memory_occupation")
    rolling.resume(directory)
    rolling.until(directory, lambda status: status["state"] == State.READY, READY_SECONDS, "ready", _say)
    print("awake and ready")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _directory(made: argparse.ArgumentParser, argv: list[str]) -> Path:
    directory = directory_of(made.parse_args(argv))
    config = configuration.load(directory)
    if not config.leads:
        raise NodeError(f"rank {config.node_rank} of {config.nnodes}: a group sleeps as a whole; type it on rank 0")
    return directory


def _state(directory: Path) -> str:
    return str(rolling.document(directory)["state"])


def _ask(directory: Path, path: str) -> dict[str, Any]:
    """One engine route over the node's HTTP port. Raises NodeError with what the engine says."""
    config = configuration.load(directory)
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.system_host, config.system_host)
    url = f"http://{host}:{config.system_port}/engine/{path}"
    request = urllib.request.Request(url, data=b"{}", headers={"Content-Type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=CONTROL_SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        raise NodeError(f"{path}: {error.read().decode(errors='replace')}; `sgnode resume` lets it serve again") from error
    except OSError as error:
        raise NodeError(f"{url}: {error}; is the prober up? see `sgnode status`") from error
    return found
