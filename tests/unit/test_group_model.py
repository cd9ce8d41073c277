"""The group's protocol against every order of faults that hypothesis finds: never two epochs at once, and never a hang.

Not in the model: a second machine that takes a rank while the first still has an engine. The leader takes it once the first was
silent for the deadline, and that engine's end may take longer; a node that is restarted in place has no engine by construction.
"""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from procs.coordinator.group.group import PAUSE_SECONDS, TICK_SECONDS
from tests.conftest import SOAK
from tests.group_world import DEADLINE, Node, World

AGREE_SECONDS = PAUSE_SECONDS + 4 * DEADLINE
"""From the last fault to one epoch: a node that was replaced waits until the silence of its earlier life means something."""
ranks = st.sampled_from([0, 0, 0, 1, 2, 3, 4])
"""Of the largest group, taken modulo its size: so a shrunk example stays one. Most depends on the leader."""
seconds = st.sampled_from([0.0, 0.2, 0.5, 1.0, 1.8, 2.2, 5.0])
"""How long a fault lasts."""
ticks = st.sampled_from([0, 1, 2, 4, 8, 16, 30])
"""What passes before the next one."""
frames = st.integers(0, 3)


class GroupMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(2)

    @initialize(nnodes=st.sampled_from([2, 2, 3, 3, 4, 5]), settled=st.booleans())
    def begin(self, nnodes: int, settled: bool) -> None:
        self.world = World(nnodes)
        if settled:
            self.agree()

    def node(self, rank: int) -> Node:
        return self.world.nodes[rank % self.world.nnodes]

    def follower(self, rank: int) -> int:
        return 1 + rank % (self.world.nnodes - 1)

    def agree(self) -> None:
        world = self.world
        world.heal()
        began = world.now
        while not world.whole:
            assert world.now - began < AGREE_SECONDS, f"no epoch: {world.leader and world.leader.unmet(world.now)}"
            world.passes(1)
        world.passes(round(2 * DEADLINE / TICK_SECONDS))
        assert world.whole, "it did not stay together"

    # --- time and frames ---

    @rule(then=st.integers(1, 30), flow_first=st.booleans())
    def time_passes(self, then: int, flow_first: bool) -> None:
        self.world.passes(then, flow_first=flow_first)

    @rule(length=st.sampled_from([0.05, 0.5, DEADLINE + 0.05, 61.0]), flow_first=st.booleans())
    def everything_stands_still(self, length: float, flow_first: bool) -> None:
        self.world.now += length
        self.world.turns(flow_first=flow_first)

    @rule(rank=ranks, directions=st.sampled_from([{"up"}, {"down"}, {"up", "down"}]), length=seconds, then=ticks)
    def a_link_is_cut(self, rank: int, directions: set[str], length: float, then: int) -> None:
        link = self.world.links[self.follower(rank)]
        link.held |= directions
        self.world.after(length, link.held.clear)
        self.world.passes(then)

    @rule(rank=ranks, direction=st.sampled_from(["up", "down"]), delay=st.sampled_from([0.0, 0.3, 1.0, 1.7, 3.0]), then=ticks)
    def a_link_is_slow(self, rank: int, direction: str, delay: float, then: int) -> None:
        self.world.links[self.follower(rank)].delay[direction] = delay
        self.world.passes(then)

    @rule(rank=ranks, arrived=frames, then=ticks)
    def a_connection_closes(self, rank: int, arrived: int, then: int) -> None:
        self.world.disconnect(self.follower(rank), arrived=arrived)
        self.world.passes(then)

    @rule(rank=ranks, up=frames, old=st.booleans(), down=frames, turn=st.booleans())
    def frames_arrive(self, rank: int, up: int, old: bool, down: int, turn: bool) -> None:
        """In an order that no clock makes."""
        follower = self.follower(rank)
        link = self.world.links[follower]
        if old and link.old:
            self.world.deliver_up(follower, old=True)
        for _ in range(min(up, len(link.up))):
            self.world.deliver_up(follower)
        for _ in range(min(down, len(link.down))):
            self.world.deliver_down(follower)
        if turn:
            self.world.turn(self.node(rank))

    # --- engines, coordinators, nodes ---

    @rule(rank=ranks, clearing=st.sampled_from([0.0, 0.3, 3.0]), times=st.integers(1, 4), then=ticks)
    def an_engine_dies(self, rank: int, clearing: float, times: int, then: int) -> None:
        """``times``: as often as it is started, perhaps before everybody has heard of the epoch before."""
        self.node(rank).clearing = clearing
        for _ in range(times):
            self.world.kill(self.node(rank))
            self.world.passes(then)

    @rule(rank=ranks, length=seconds, then=ticks)
    def a_coordinator_is_slow(self, rank: int, length: float, then: int) -> None:
        node = self.node(rank)
        node.slow = True
        self.world.after(length, lambda: setattr(node, "slow", False))
        self.world.passes(then)

    @rule(rank=ranks, arrived=frames, how=st.sampled_from(["killed", "restarted", "with its engine"]), length=seconds, then=ticks)
    def a_coordinator_ends(self, rank: int, arrived: int, how: str, length: float, then: int) -> None:
        node = self.node(rank)
        self.world.end_coordinator(node, arrived=arrived, announced=how == "restarted")
        if how == "with its engine":
            self.world.kill(node)
        self.world.after(length, lambda: self.world.begin(node))
        self.world.passes(then)

    @rule(rank=ranks, then=ticks)
    def a_node_is_restarted(self, rank: int, then: int) -> None:
        self.world.restart_node(self.node(rank))
        self.world.passes(then)

    # --- what is wanted ---

    @rule(rank=ranks, want=st.sampled_from(["drain", "stop"]), length=seconds, then=ticks)
    def a_node_shall_drain_or_stop(self, rank: int, want: str, length: float, then: int) -> None:
        node = self.node(rank)
        node.want = want
        self.world.say(node)
        if want == "stop":
            self.world.after(length, lambda: self.world.restart_node(node))
        else:
            self.world.after(length, lambda: setattr(node, "want", "serve") if node.want == "drain" else None)
        self.world.passes(then)

    @rule(then=ticks)
    def the_leader_has_drained(self, then: int) -> None:
        leader = self.world.leader
        wishing = leader.wish(self.world.now) if leader is not None else None
        if leader is not None and leader.open and wishing is not None and wishing[1].want == "stop":
            leader.end(f"rank {wishing[0]} is stopping", orderly=True)
            self.world.ended(self.world.nodes[0])
        self.world.passes(then)

    @rule(arrived=frames, length=seconds, then=ticks)
    def the_leader_leaves(self, arrived: int, length: float, then: int) -> None:
        node, leader = self.world.nodes[0], self.world.leader
        if leader is not None:
            leader.end("the leader has stopped", orderly=True)
            self.world.say(node)
        self.world.end_coordinator(node, arrived=arrived)
        node.want, node.engine = "stop", None  # supervisord has ended it before
        self.world.after(length, lambda: self.world.restart_node(node))
        self.world.passes(then)

    @rule()
    def all_heals(self) -> None:
        self.agree()

    # --- what must be true ---

    @invariant()
    def nothing_is_wrong(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.agree()


TestGroup = GroupMachine.TestCase
TestGroup.settings = settings(
    max_examples=3000 if SOAK else 400,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
