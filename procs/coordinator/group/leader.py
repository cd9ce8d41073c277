"""The leader's side of a group: hears every rank, opens an epoch when all agree, ends it when any part fails (pure).

What makes two epochs impossible: an epoch opens only when every rank has said, after it heard that the one before is over, that
no process of its engine is left. Both sides say all that they know in every frame, so a lost one costs half a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.epoch import Started
from shared.frames import PROTOCOL, Epoch, Member, Refused

SKEW_SECONDS = 2.0
"""Clocks further apart than this make logs and NCCL's own timeouts lie: such a group does not start."""
START_SECONDS = 60.0
"""For a rank that is in contact to have its engine's process started: a keeper that kills leftovers takes up to 30 s."""
RUNS = ("up", "ready")


@dataclass
class Rank:
    """What is known of another rank. Times in seconds of one monotonic clock."""

    since: float
    """When it was last seen, or when we began to look."""
    member: Member | None = None
    skew: float = 0.0
    """Its clock less ours, seconds."""
    pause: float = 0.0
    """Silence that was announced."""
    twin: str = ""
    """Who else says to be this rank, and is refused."""
    twin_at: float = 0.0


@dataclass
class Leader:
    """Rank 0 of ``nnodes``. Feed it every Member, its own engine and the time; ``frame`` is what everybody shall hear."""

    nnodes: int
    facts: dict[str, str]
    life: str
    group: str
    deadline: float
    now: float
    """When this life began."""
    epoch: int = 0
    open: bool = False
    """Adopted: its own engine of that epoch lives."""
    reason: str = ""
    """Why the last epoch is over."""
    orderly: bool = True
    engine: str = "none"
    """Its own, as in Member."""
    ranks: dict[int, Rank] = field(default_factory=dict)
    _number: int = 0
    _ended: int = 1
    """The first frame that says that no epoch is open."""
    _opened: float = 0.0
    _nodes: dict[int, str] = field(default_factory=dict)
    """Which node each rank was when the epoch opened: another one may not slip into it."""

    def __post_init__(self) -> None:
        self.ranks = {rank: Rank(self.now) for rank in range(1, self.nnodes)}
        self._opened = self.now

    # --- hearing ---

    def hear(self, member: Member, now: float, wall: float) -> Refused | None:
        """Take what a rank says; the answer to one that can't belong here. ``wall``: UNIX seconds."""
        if member.protocol not in (PROTOCOL, PROTOCOL - 1):
            return Refused(
                f"{member.host} speaks protocol {member.protocol}, the leader {PROTOCOL}: upgrade the older of the two"
            )
        if member.node_rank == 0:
            return Refused(f"{member.host} is rank 0 as well: a group has one leader; give it another --node-rank")
        rank = self.ranks.get(member.node_rank)
        if rank is None:
            return Refused(f"rank {member.node_rank}: --nnodes {self.nnodes} has ranks 0 to {self.nnodes - 1}")
        known = rank.member
        if known is not None and known.node != member.node and not self._silent(rank, now):
            if known.host == member.host:
                earlier = f"its earlier life is given up {self.deadline:g} s after its last word"
                return Refused(f"rank {member.node_rank} ({known.host}) was started again; {earlier}")
            rank.twin, rank.twin_at = member.host, now
            return Refused(f"rank {member.node_rank} is {known.host} already; give one another --node-rank")
        if known is not None and known.life == member.life and known.number >= member.number:
            return None  # overtaken by a newer one
        rank.member, rank.since, rank.skew, rank.pause = member, now, member.clock - wall, member.pause
        return None

    # --- deciding ---

    def look(self, now: float) -> bool:
        """True when this look has ended the epoch."""
        if not self.open:
            return False
        why = self._failure(now)
        if why:
            self.end(why)
        return bool(why)

    def _failure(self, now: float) -> str:
        if self.engine not in RUNS:
            return "rank 0: its engine is dead"
        for number, rank in self.ranks.items():
            member = rank.member
            name = f"rank {number}" + (f" ({member.host})" if member is not None else "")
            if self._silent(rank, now):
                return f"{name}: no sign of life for {self.deadline:g} s"
            if member is None:
                continue  # a leader that has just come back: it has until the deadline
            if self._nodes.get(number, member.node) != member.node:
                return f"{name}: it was started again"
            if self._is_here(member):
                self._nodes[number] = member.node  # known again after a restart of this coordinator
                if member.engine not in RUNS:
                    return f"{name}: {member.reason or 'its engine is gone'}"
            elif number not in self._nodes:
                return f"{name}: it has no engine of epoch {self.epoch}"
            elif now - self._opened > START_SECONDS:
                return f"{name}: its engine was not started within {START_SECONDS:.0f} s"
        return ""

    def _silent(self, rank: Rank, now: float) -> bool:
        """No sign of life for too long."""
        return now - rank.since > self.deadline + rank.pause

    def _is_here(self, member: Member) -> bool:
        """Its engine was started for this epoch."""
        return (member.group, member.epoch) == (self.group, self.epoch)

    def end(self, reason: str, *, orderly: bool = False) -> None:
        """The epoch is over for everybody."""
        if self.open:
            self.open, self.reason, self.orderly = False, reason, orderly
            self._ended = self._number + 1

    def unmet(self, now: float) -> str:
        """What has to happen before an epoch can open, in an operator's words; empty when it can."""
        missing = [number for number, rank in self.ranks.items() if rank.member is None or self._silent(rank, now)]
        if missing:
            plural = "ranks" if len(missing) > 1 else "rank"
            longest = now - min(self.ranks[number].since for number in missing)
            return f"{plural} {_listed(missing)} of {self.nnodes} not seen, {longest:.0f} s"
        if differences := self.differences():
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            return f"{differences[0]}{more}"
        for number, rank in self.ranks.items():
            member = rank.member
            assert member is not None
            if member.want == "stop":
                return f"rank {number} ({member.host}), which is stopping"
            if member.engine != "none":
                return f"the end of the engine of rank {number} ({member.host})"
            if member.leader != self.life or member.heard < self._ended:
                return f"rank {number} ({member.host}) to hear that no epoch is open"
        return ""

    def differences(self) -> list[str]:
        """One line for each fact in which a rank is not as the leader, and for each clock that is off."""
        found = []
        for number, rank in self.ranks.items():
            member = rank.member
            if member is None:
                continue
            if abs(rank.skew) > SKEW_SECONDS:
                way = "ahead of" if rank.skew > 0 else "behind"
                found.append(f"rank {number} ({member.host}): its clock is {abs(rank.skew):.1f} s {way} the leader's")
            for name in sorted(self.facts.keys() | member.facts.keys()):
                ours, theirs = self.facts.get(name, "-"), member.facts.get(name, "-")
                if ours != theirs:
                    found.append(f"rank {number} ({member.host}): {name} is {theirs}, on the leader {ours}")
        return found

    def twin(self, rank: int, now: float) -> str:
        """Who else says to be this rank at present; empty when nobody does."""
        known = self.ranks[rank]
        return known.twin if known.twin and now - known.twin_at <= self.deadline else ""

    def wish(self, now: float) -> tuple[int, Member] | None:
        """The first rank in contact that wants to stop, or else to drain."""
        fresh = [(number, rank.member) for number, rank in self.ranks.items() if not self._silent(rank, now)]
        for want in ("stop", "drain"):
            for number, member in fresh:
                if member is not None and member.want == want:
                    return number, member
        return None

    def start(self, now: float) -> Started:
        """Open the next epoch. To be saved before ``frame`` is sent."""
        assert not self.open
        self.epoch, self.open, self._opened = self.epoch + 1, True, now
        self.engine = "up"
        self._nodes = {number: rank.member.node for number, rank in self.ranks.items() if rank.member is not None}
        return Started(self.group, self.epoch)

    # --- saying ---

    def frame(
        self,
        now: float,
        *,
        waiting_for: str = "",
        state: str = "",
        progress: str = "",
        workers: Sequence[str] = (),
        pause: float = 0.0,
    ) -> Epoch:
        """What everybody shall hear now. Each has a new number. ``waiting_for``: what the leader itself waits for."""
        self._number += 1
        waiting_for = "" if self.open else self.unmet(now) or waiting_for
        return Epoch(
            PROTOCOL, self.life, self._number, self.group, self.epoch, self.open, self.orderly, self.reason, waiting_for, state,
            progress, list(workers), pause,
        )  # fmt: skip


def _listed(numbers: list[int]) -> str:
    """``1, 3, 5-9``: a thousand ranks shall fit in a line."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
