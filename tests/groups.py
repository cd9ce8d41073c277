"""Groups of nodes on this machine: the same flags on every rank, each in a runtime directory of its own."""

import socket
from pathlib import Path
from typing import Any

from tests.harness import Node, wait_for

GROUP_PORT_OFFSET = 100
DIALS = "step_seconds=0.01"


def dist_port(host: str = "127.0.0.1") -> int:
    """A port that is free, and so is the group's."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind((host, 0))
            port = int(first.getsockname()[1])
            try:
                second.bind((host, port + GROUP_PORT_OFFSET))
            except (OSError, OverflowError):
                continue
            return port


class Group:
    """``nnodes`` nodes with a synthetic engine, none started yet. ``nodes[i]`` is rank i."""

    def __init__(
        self, model: Path, nnodes: int, *arguments: str, name: str = "synthetic", dials: str = "step_seconds=0.01"
    ) -> None:
        self.model = model
        self.nnodes = nnodes
        self.place = f"127.0.0.1:{dist_port()}"
        self.arguments = ["--served-model-name", name, "--synthetic", dials, "--tp-size", str(nnodes), *arguments]
        self.nodes = [self.make(rank) for rank in range(nnodes)]
        self.extra: list[Node] = []

    def make(self, rank: int, *more: str, name: str = "", env: dict[str, str] | None = None) -> Node:
        """A node for a rank; ``more`` flags win over the group's."""
        where = ["--nnodes", str(self.nnodes), "--node-rank", str(rank), "--dist-init-addr", self.place]
        return Node(str(self.model), *self.arguments, *where, *more, name=name or f"r{rank}", env=env)

    @property
    def leader(self) -> Node:
        return self.nodes[0]

    def start(self) -> "Group":
        for node in self.nodes:
            node.start()
        return self

    def wait_ready(self, seconds: float = 60.0) -> "Group":
        """Every rank is ready, in one epoch."""
        for node in reversed(self.nodes):
            node.wait_ready(seconds)
        wait_for("one epoch", lambda: len({node.status().get("epoch") for node in self.nodes}) == 1, seconds)
        return self

    @property
    def epoch(self) -> int:
        return int(self.leader.status().get("epoch", 0))

    def engines(self) -> list[int]:
        return [node.pid("engine") for node in self.nodes]

    def extra_node(self, *arguments: Any, **more: Any) -> Node:
        """One more node of the same flags, ended with the group."""
        self.extra.append(self.make(*arguments, **more))
        return self.extra[-1]

    def logs(self) -> str:
        return "\n".join(f"=== rank {rank}\n{node.logs()}" for rank, node in enumerate(self.nodes))

    def close(self) -> None:
        for node in [*self.extra, *self.nodes]:
            node.close()
