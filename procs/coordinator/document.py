"""The status document that the coordinator reports (pure). Keys are only ever added; supervisord's plugin adds its own facts."""

from typing import Any

from procs.coordinator.node import Facts, NodeState
from shared.config import NodeConfig
from shared.frames import Beat
from shared.state import Board


def build(config: NodeConfig, board: Board, facts: Facts, node: NodeState, *, since: float, incarnation: int) -> dict[str, Any]:
    """``since``: UNIX seconds of the node's last change of state."""
    engine = facts.engine
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
        "registered": facts.registered,
        "epoch": engine.epoch if engine else 0,
        "incarnation": incarnation,
        "inflight": facts.inflight,
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
        if beat.numbers:
            row["numbers"] = beat.numbers
    elif name == "engine":
        row["state"] = "waiting"
    return row
