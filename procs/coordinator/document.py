"""The status document that the coordinator reports (pure). Keys are only ever added; supervisord's plugin adds its own facts."""

from dataclasses import asdict, dataclass, field
from typing import Any

from procs.coordinator.node import Facts, NodeState
from shared.config import NodeConfig
from shared.frames import Beat
from shared.state import Board


@dataclass
class Crashes:
    """What is remembered of the engine's deaths. The status document is also where the next coordinator has it from."""

    deaths: list[float] = field(default_factory=list)
    """UNIX seconds of each since the last good life."""
    restart_at: float | None = None
    """UNIX seconds of the next start."""
    failed: str = ""
    """Why it is not started any more."""
    last_crash: dict[str, Any] | None = None
    """``reason``, ``at``, ``incarnation`` and ``path`` of the newest bundle (procs/coordinator/crash.py)."""
    last_log: list[str] = field(default_factory=list)
    """The end of the engine's log at its death, until the node is ready again."""


def build(
    config: NodeConfig, board: Board, facts: Facts, node: NodeState, *, since: float, incarnation: int, crashes: Crashes
) -> dict[str, Any]:
    """``since``: UNIX seconds of the node's last change of state."""
    names = list(config.processes)
    if config.frontend and config.node_rank == 0:
        names.append("frontend")
    return {
        "name": config.name,
        "version": config.version,
        "role": config.role,
        "node_rank": config.node_rank,
        "state": node.state,
        "reason": node.reason,
        "since": since,
        "waiting_for": node.waiting_for,
        "want": facts.want,
        "drain": facts.drain,
        "registered": facts.registered,
        "epoch": 0,
        "incarnation": incarnation,
        "inflight": facts.inflight,
        **asdict(crashes),
        "model": config.served_model_name,
        "ports": {"http": config.http_port if config.frontend else None, "system": config.system_port},
        "processes": [_row(name, board) for name in names],
    }


def _row(name: str, board: Board) -> dict[str, Any]:
    heard = board.heard.get(name)
    beat: Beat | None = None if heard is None else heard.beat
    row: dict[str, Any] = {"name": name, "pid": None, "state": "", "detail": "", "waiting_for": ""}
    if beat is not None:
        row |= {"pid": beat.pid, "state": board.state(name), "detail": beat.detail, "waiting_for": beat.waiting_for}
        row["since"] = beat.since
        if beat.numbers:
            row["numbers"] = beat.numbers
    elif name == "engine":
        row["state"] = "waiting"
    return row
