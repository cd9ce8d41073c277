"""What the coordinator asks of its group, and the answers of a node that serves its model alone."""

from collections.abc import Callable
from typing import Any

from procs.coordinator.node import Facts, NodeState

TICK_SECONDS = 0.1
"""How often deadlines are looked at."""
PAUSE_SECONDS = 8.0
"""For a coordinator that is restarted to be heard again: stop, start and connection on a host under load."""
Over = Callable[[str, bool], None]
"""Called with a reason, and whether it was wanted, when this node's engine has to end now. May be called again."""


class Group:
    """A node that is alone. Everything that may be asked of a group is harmless here."""

    epoch = 0
    """The one that this node's engine was last started for."""

    def begin(self, document: dict[str, Any], *, alive: bool) -> None:
        """Open the sockets, in the running loop.

        ``document``: the status that an earlier coordinator left; ``alive``: the engine lives.
        """

    def close(self, *, leaving: bool) -> None:
        """``leaving``: the node stops, and not only this process."""

    def unmet(self) -> str | None:
        """What the engine's start waits for; None when it may start."""
        return None

    def starting(self) -> None:
        """The engine is being started now. Raises OSError when that can't be written down."""

    def set_engine(self, engine: str, reason: str) -> None:
        """``none``, ``up``, ``ready`` or ``dead``, and why it is gone."""

    def set_want(self, want: str) -> None:
        """What is wanted of this node."""

    def heed(self, facts: Facts, node: NodeState) -> None:
        """How the node is, at each report."""

    def workers(self, facts: Facts) -> list[str]:
        """Worker ids of the agents in front of this engine: KV events of every rank are published under them."""
        return sorted(agent.info["worker_id"] for agent in facts.agents if "worker_id" in agent.info)

    def wish(self) -> str:
        """Why this node shall drain for the sake of another; empty when it needn't."""
        return ""

    def end(self, reason: str) -> None:
        """End the epoch because a person wants it."""

    @property
    def holds_stop(self) -> bool:
        """Others still need this node's engine: its stop waits until the leader has drained."""
        return False

    @property
    def progress(self) -> str:
        """How the leader's drain goes on."""
        return ""

    @property
    def leader_state(self) -> str:
        """The leader node's state; empty when it is not known."""
        return ""

    def document(self) -> dict[str, Any]:
        """Its part of the status document."""
        return {}
