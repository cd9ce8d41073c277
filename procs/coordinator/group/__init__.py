"""The group of nodes that serve one model: who is there, when an epoch opens, and that its end is everybody's."""

from collections.abc import Callable

from procs.coordinator.group.following import Following
from procs.coordinator.group.group import Group, Over
from procs.coordinator.group.leading import Leading
from shared.config import NodeConfig

__all__ = ["Group", "make"]


def make(config: NodeConfig, on_change: Callable[[], None], over: Over) -> Group:
    """This node's group. ``on_change``: something may be done now that could not before."""
    if config.nnodes == 1:
        return Group()
    return Leading(config, on_change, over) if config.leads else Following(config, on_change, over)
