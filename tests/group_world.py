"""A simulated group: the pure Leader and Followers, their nodes, and a network that delays, cuts and drops, on one clock.

What the real coordinator does around the state machines is done here the same way (procs/coordinator/coordinator.py, leading.py,
following.py); the tests say what happens when.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from procs.coordinator.group.follower import Follower
from procs.coordinator.group.group import PAUSE_SECONDS, TICK_SECONDS
from procs.coordinator.group.leader import RUNS, Leader
from shared.epoch import Started
from shared.frames import Epoch, Member, Refused
from shared.state import BEAT_SECONDS

DEADLINE = 2.0
CLEARING_SECONDS = 0.3
"""What a dead engine's processes need to go, in a world without faults."""
READY_SECONDS = 0.3
CHATTER = 200
"""Rounds of frames that make more frames at one moment: a group that talks more than this never stops."""


@dataclass
class Process:
    """An engine of one node, from its start until no process of it is left."""

    started: Started
    at: float
    ready: bool = False
    dead_at: float | None = None
    """When it began to be cleared away."""


@dataclass
class Node:
    """One machine. What is not in ``room`` outlives its coordinator."""

    rank: int
    name: str
    saved: Started = field(default_factory=Started)
    """The epoch file."""
    engine: Process | None = None
    room: Leader | Follower | None = None
    """Its coordinator's; None while that is dead."""
    want: str = "serve"
    clearing: float = CLEARING_SECONDS
    """How long its engine's processes need to go."""
    slow: bool = False
    """Its coordinator is busy elsewhere: it hears and says, and does not come to start the engine."""
    knows: bool = False
    """This life of the coordinator has heard that the engine is dead."""
    say_at: float = 0.0
    contact: float = 0.0
    """When a follower last heard that its engine's epoch is open (any, when it has no engine), or began."""
    pause: float = 0.0
    """Silence of the leader that was announced to it."""
    was: tuple[str, int, bool] | None = None
    """What the leader said last, as far as it is news."""


@dataclass
class Link:
    """One follower's connection. What was under way when it closed is gone, or is read late (``old``)."""

    up: deque[tuple[float, Member]] = field(default_factory=deque)
    """With the time at which each arrives."""
    down: deque[tuple[float, Epoch | Refused]] = field(default_factory=deque)
    old: deque[Member] = field(default_factory=deque)
    """From closed connections, at the leader's machine already: a ROUTER reads them between those of the new one."""
    connected: bool = False
    heard: bool = False
    """The leader has heard it on this connection, so it can say something there."""
    held: set[str] = field(default_factory=set)
    """Directions in which nothing arrives for now."""
    delay: dict[str, float] = field(default_factory=lambda: {"up": 0.0, "down": 0.0})
    heard_at: float = 0.0
    """When the leader last heard this rank, or began."""
    pause: float = 0.0
    """Silence of this rank that was announced to the leader."""


class World:
    """``nnodes`` nodes, rank 0 leads. Everything that may not happen is asserted where it would happen, or in ``check``."""

    def __init__(self, nnodes: int) -> None:
        self.now = 1000.0
        self.nnodes = nnodes
        self.lives = 0
        self.newest: dict[str, int] = {}
        """The highest epoch of each group."""
        self.later: list[tuple[float, Callable[[], None]]] = []
        """What ends by itself, and when."""
        self.ever: set[tuple[int, Started]] = set()
        """Every engine that was started."""
        self.nodes = [Node(rank, self.name("node")) for rank in range(nnodes)]
        self.links = {rank: Link() for rank in range(1, nnodes)}
        for node in self.nodes:
            self.begin(node)

    def name(self, kind: str) -> str:
        self.lives += 1
        return f"{kind}-{self.lives}"

    @property
    def leader(self) -> Leader | None:
        room = self.nodes[0].room
        assert room is None or isinstance(room, Leader)
        return room

    # --- coordinators ---

    def begin(self, node: Node) -> None:
        """A life of its coordinator, as ``begin`` of leading.py and following.py has it, unless it lives."""
        if node.room is not None:
            return
        was, alive = node.saved, node.engine is not None
        engine = "up" if alive else "none"
        node.knows, node.was, node.contact, node.pause, node.say_at = False, None, self.now, 0.0, self.now
        if node.rank == 0:
            group = was.group or self.name("group")
            for link in self.links.values():
                link.heard_at, link.pause = self.now, 0.0
            node.room = Leader(
                self.nnodes, {}, self.name("life"), group, DEADLINE, self.now, was.epoch, alive and bool(was.epoch), engine=engine
            )
        else:
            node.room = Follower(
                node.rank, self.nnodes, "h:1", f"h{node.rank}", node.name, {}, self.name("life"), DEADLINE, self.now, was, engine
            )

    def end_coordinator(self, node: Node, *, arrived: int = 0, announced: bool = False) -> None:
        """``arrived``: so many frames of each connection are at their receiver's machine already; ``announced``: not killed."""
        if node.room is None:
            return
        if announced:
            self.say(node, PAUSE_SECONDS)
        node.room = None
        for rank in self.links if node.rank == 0 else [node.rank]:
            self.disconnect(rank, arrived=arrived)

    def restart_node(self, node: Node) -> None:
        """All of it: a fresh runtime directory, and no process of the old engine by construction."""
        self.end_coordinator(node)
        node.name, node.saved, node.engine, node.want = self.name("node"), Started(), None, "serve"
        self.begin(node)

    def turn(self, node: Node) -> None:
        """One tick of the group's timer, and one turn of the coordinator's loop."""
        room = node.room
        if room is None:
            return
        self.look(node)
        self.tell(node)
        if node.engine is None and node.want != "stop" and not node.slow:
            unmet = f"the end of epoch {room.epoch}" if isinstance(room, Leader) and room.open else room.unmet(self.now)
            if not unmet:
                self.start_engine(node)
        if self.now >= node.say_at:
            self.say(node)

    def look(self, node: Node) -> None:
        room = node.room
        if isinstance(room, Leader):
            if room.look(self.now):
                self.ended(node)
        elif room is not None and room.over(self.now):
            self.kill(node)

    def ended(self, leader: Node) -> None:
        self.say(leader)
        self.kill(leader)

    def start_engine(self, node: Node) -> None:
        room = node.room
        assert room is not None
        node.saved = room.start(self.now) if isinstance(room, Leader) else room.start()
        assert (node.rank, node.saved) not in self.ever, f"rank {node.rank} started an engine twice in {node.saved}"
        self.ever.add((node.rank, node.saved))
        node.engine, node.knows = Process(node.saved, self.now), False
        self.say(node)

    def kill(self, node: Node) -> None:
        """This node's engine dies, or is ended by its coordinator."""
        if node.engine is not None:
            node.engine.dead_at = self.now if node.engine.dead_at is None else node.engine.dead_at
            node.knows = node.room is not None
            self.tell(node)

    def tell(self, node: Node) -> None:
        """The coordinator tells its room how the engine is."""
        room, engine = node.room, node.engine
        if engine is None:
            word = "none"
        elif engine.dead_at is not None and node.knows:
            word = "dead"
        else:
            word = "ready" if engine.ready else "up"
        if room is None or word == room.engine:
            return
        room.engine = word
        if isinstance(room, Follower):
            self.say(node)
        elif room.open and word not in RUNS:
            room.end("rank 0: its engine is gone")
            self.ended(node)

    # --- frames ---

    def say(self, node: Node, pause: float = 0.0) -> None:
        room = node.room
        node.say_at = self.now + BEAT_SECONDS
        if isinstance(room, Leader):
            frame = room.frame(self.now, pause=pause)
            for link in self.links.values():
                if link.connected and link.heard:
                    link.down.append((self.now + link.delay["down"], frame))
        elif room is not None and (link := self.links[node.rank]).connected:
            link.up.append((self.now + link.delay["up"], room.frame(self.now, node.want, pause)))

    def deliver_up(self, rank: int, *, old: bool = False) -> None:
        """The leader reads one frame."""
        link, leader = self.links[rank], self.nodes[0]
        member = link.old.popleft() if old else link.up.popleft()[1]
        room = leader.room
        assert isinstance(room, Leader)
        was = room.ranks[rank].member
        refused = room.hear(member, self.now, self.now)
        if refused is not None:
            if not old:
                link.down.append((self.now + link.delay["down"], refused))
            return
        link.heard_at, link.pause = self.now, member.pause
        self.look(leader)
        if was is None or _news(was) != _news(member):
            self.say(leader)
        link.heard = link.heard or not old

    def deliver_down(self, rank: int) -> None:
        """A follower reads one frame."""
        node = self.nodes[rank]
        frame, room = self.links[rank].down.popleft()[1], node.room
        assert isinstance(room, Follower)
        if isinstance(frame, Refused):
            room.refuse(frame.reason)
            self.look(node)
            return
        room.hear(frame, self.now)
        ours = node.engine is None or node.engine.started == Started(frame.group, frame.epoch)
        if room.said is frame and frame.open and ours:
            node.contact, node.pause = self.now, frame.pause
        self.look(node)
        if node.was != (frame.life, frame.epoch, frame.open):
            node.was = (frame.life, frame.epoch, frame.open)
            self.say(node)

    def disconnect(self, rank: int, *, arrived: int = 0) -> None:
        """Close the connection; ``arrived``: so many frames of either direction are read all the same, the others never."""
        link, node = self.links[rank], self.nodes[rank]
        link.connected = link.heard = False
        link.old = deque() if self.leader is None else deque([*link.old, *[member for _, member in link.up][:arrived]])
        link.down = deque() if node.room is None else deque(list(link.down)[:arrived])
        link.up.clear()

    def connect(self, rank: int) -> None:
        link, node = self.links[rank], self.nodes[rank]
        if not link.connected and not link.held and self.leader is not None and node.room is not None:
            link.connected = True
            self.say(node)

    def flow(self) -> None:
        """Everything arrives that is due and that nothing holds, and what is said because of it."""
        for _ in range(CHATTER):
            moved = False
            for rank, link in self.links.items():
                while link.old and self.leader is not None:
                    self.deliver_up(rank, old=True)
                while link.up and "up" not in link.held and link.up[0][0] <= self.now:
                    self.deliver_up(rank)
                    moved = True
                while link.down and "down" not in link.held and link.down[0][0] <= self.now:
                    self.deliver_down(rank)
                    moved = True
            if not moved:
                return
        raise AssertionError("the group never stops talking")

    # --- time ---

    def turns(self, *, flow_first: bool) -> None:
        """Every timer that is due, and every socket: which of them comes first is chance."""
        if flow_first:
            self.flow()
        for rank in self.links:
            self.connect(rank)
        for node in self.nodes:
            self.turn(node)
        self.flow()
        for node in self.nodes:
            self.turn(node)

    def passes(self, ticks: int, *, flow_first: bool = False) -> None:
        for _ in range(ticks):
            self.now += TICK_SECONDS
            due = [action for at, action in self.later if at <= self.now]
            self.later = [(at, action) for at, action in self.later if at > self.now]
            for action in due:
                action()
            for node in self.nodes:
                self.engine_goes_on(node)
            self.turns(flow_first=flow_first)
            self.check()

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self.later.append((self.now + seconds, action))

    def engine_goes_on(self, node: Node) -> None:
        """It becomes ready, or what is left of it goes."""
        engine = node.engine
        if engine is None:
            return
        if engine.dead_at is None:
            engine.ready = engine.ready or self.now - engine.at >= READY_SECONDS
        elif self.now - engine.dead_at >= node.clearing:
            node.engine = None

    def heal(self) -> None:
        """Every fault ends: what was stopped is started, what was cut is whole."""
        self.later.clear()
        for link in self.links.values():
            link.held.clear()
            link.delay = {"up": 0.0, "down": 0.0}
            link.up = deque((self.now, member) for _, member in link.up)
            link.down = deque((self.now, frame) for _, frame in link.down)
        for node in self.nodes:
            node.slow, node.clearing = False, CLEARING_SECONDS
            if node.want == "stop":
                self.restart_node(node)
            node.want = "serve"
            self.begin(node)

    # --- what must be true ---

    def check(self) -> None:
        """At every moment."""
        alive = {node.engine.started for node in self.nodes if node.engine is not None}
        assert len(alive) <= 1, f"engines of two epochs: {alive}"
        if (leader := self.leader) is not None:
            assert leader.epoch >= self.newest.get(leader.group, 0), "the epoch went back"
            self.newest[leader.group] = leader.epoch
            for rank, link in self.links.items():
                silent = self.now - link.heard_at - link.pause
                assert not leader.open or silent <= DEADLINE + TICK_SECONDS, f"open, {silent:.1f} s after rank {rank}'s last word"
        for node in self.nodes[1:]:
            if node.room is not None and node.engine is not None and node.engine.dead_at is None:
                silent = self.now - max(node.contact, node.engine.at) - node.pause
                assert silent <= DEADLINE + TICK_SECONDS, f"rank {node.rank} runs on, {silent:.1f} s after its epoch's last word"

    @property
    def whole(self) -> bool:
        """One epoch is open, and every engine is up in it."""
        leader = self.leader
        return leader is not None and leader.open and all(
            node.engine is not None
            and node.engine.dead_at is None
            and node.engine.started == Started(leader.group, leader.epoch)
            for node in self.nodes
        )  # fmt: skip


def _news(member: Member) -> tuple[str, str, int, str]:
    return member.life, member.engine, member.epoch, member.want
