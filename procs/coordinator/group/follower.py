"""A follower's side of a group: does what the leader says, and ends its engine by itself when it hears nothing (pure)."""

from dataclasses import dataclass, field

from shared.epoch import Started
from shared.frames import PROTOCOL, Epoch, Member


@dataclass
class Follower:
    """Any rank but 0. Feed it every Epoch, its own engine and the time; ``frame`` is what the leader shall hear."""

    node_rank: int
    nnodes: int
    place: str
    """Where the leader listens, for an operator's eyes."""
    host: str
    node: str
    facts: dict[str, str]
    life: str
    deadline: float
    now: float
    """When this life began."""
    ran: Started = field(default_factory=Started)
    """The epoch that its engine was last started for."""
    engine: str = "none"
    reason: str = ""
    """Why its engine is gone."""
    said: Epoch | None = None
    """The leader's newest word."""
    refused: str = ""
    """Why the leader does not take it."""
    trouble: str = ""
    """Why there is no connection, as far as the sockets know."""
    _since: float = 0.0
    """When the leader was last heard."""
    _number: int = 0

    def __post_init__(self) -> None:
        self._since = self.now

    def hear(self, epoch: Epoch, now: float) -> None:
        """Take the leader's word."""
        if self.said is not None and self.said.life == epoch.life and self.said.number >= epoch.number:
            return  # overtaken by a newer one
        self.said, self._since, self.refused = epoch, now, ""

    def refuse(self, reason: str) -> None:
        """The leader does not take this node."""
        self.refused, self.said = reason, None

    def in_contact(self, now: float) -> bool:
        return self.said is not None and now - self._since <= self.deadline + self.said.pause

    @property
    def is_ours(self) -> bool:
        """The leader's word is about the epoch that our engine was started for."""
        return self.said is not None and (self.said.group, self.said.epoch) == (self.ran.group, self.ran.epoch)

    def over(self, now: float) -> str:
        """Why an engine of ours may not go on; empty while its epoch is open, and for one that isn't there."""
        if self.engine == "none":
            return ""
        if now - self._since > self.deadline + (self.said.pause if self.said is not None else 0.0):
            return f"the leader at {self.place}: no sign of life for {self.deadline:g} s"
        if self.refused:
            return self.refused
        said = self.said
        if said is None:
            return ""  # a coordinator that has just come back: the leader has until the deadline
        if not self.is_ours:
            return f"epoch {self.ran.epoch} is over, the leader is at epoch {said.epoch}"
        return "" if said.open else said.reason or "the epoch is over"

    @property
    def orderly(self) -> bool:
        """The end of the epoch was wanted: nothing has failed."""
        return self.said is not None and not self.said.open and self.said.orderly

    def unmet(self, now: float) -> str:
        """What has to happen before the engine can be started, in an operator's words; empty when it can."""
        if self.refused:
            return self.refused
        said = self.said
        if said is None or not self.in_contact(now):
            more = f": {self.trouble}" if self.trouble else ""
            return f"rank 0 of {self.nnodes} (the leader, {self.place}) not seen, {now - self._since:.0f} s{more}"
        if not said.open:
            return said.waiting_for or "the next epoch"
        if self.is_ours:
            return f"the end of epoch {said.epoch}: its engine here is gone"
        return ""

    def start(self) -> Started:
        """Start the engine for the open epoch; to be saved before it is. Call it when nothing is unmet."""
        assert self.said is not None
        self.ran, self.engine, self.reason = Started(self.said.group, self.said.epoch), "up", ""
        return self.ran

    def frame(self, wall: float, want: str, pause: float = 0.0) -> Member:
        """What the leader shall hear now. ``wall``: UNIX seconds."""
        self._number += 1
        said = self.said
        leader, heard = ("", 0) if said is None else (said.life, said.number)
        return Member(
            PROTOCOL, self.node_rank, self.life, self.node, self.host, self._number, leader, heard, self.ran.group,
            self.ran.epoch, self.engine, self.reason, want, wall, self.facts, pause,
        )  # fmt: skip
