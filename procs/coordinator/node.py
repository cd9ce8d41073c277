"""The node's state, from what its processes say and what is wanted of it (pure)."""

from dataclasses import dataclass, field

from shared.frames import Beat, Verdict
from shared.state import LOST, State

ALIVE = ("STARTING", "RUNNING", "STOPPING")
"""supervisord's states in which the keeper exists."""


@dataclass(frozen=True)
class Facts:
    """What is known at one moment. Beats are fresh ones, None for a process that is lost or was never heard."""

    want: str = "serve"
    """``serve``, ``drain`` or ``stop``."""
    why_wanted: str = ""
    program: str = ""
    """supervisord's state of the program ``engine``; empty before the first answer."""
    started: bool = False
    """The engine was started at least once in this life of supervisord."""
    condition: str = ""
    """What its start waits for."""
    restart_in: float | None = None
    """Seconds to the next start after a death."""
    failed: str = ""
    """Why the engine is not started any more."""
    death: str = ""
    """Why the engine of the newest incarnation is dead."""
    engine: Beat | None = None
    engine_lost: bool = False
    """It was heard in this life of the keeper, and is not any more."""
    verdict: Verdict | None = None
    agents: list[Beat] = field(default_factory=list)
    needs_agents: bool = True
    """False on a follower: it has no agents and no canaries."""
    drain_timeout: float = 0.0
    """Seconds that streams get to finish in a drain."""
    held: str = ""
    """What a dead engine's processes still hold although they were killed."""
    killed_in: float | None = None
    """Seconds until an engine that hangs is killed."""
    leader_state: str = ""
    """On a follower: the leader node's state, empty while it is not heard."""
    progress: str = ""
    """On a follower: how the leader's drain goes on."""

    @property
    def streams(self) -> int:
        """Requests that clients still wait for: those of the agents, canaries not counted."""
        return sum(int(agent.numbers.get("inflight", 0)) for agent in self.agents)

    @property
    def drain(self) -> dict[str, float] | None:
        """How a drain goes on: streams left, and seconds left of how many. None while no agent drains."""
        draining = [agent for agent in self.agents if agent.state == State.DRAINING]
        if not draining:
            return None
        left = max(agent.numbers.get("drain_left_seconds", 0.0) for agent in draining)
        return {"streams": self.streams, "left_s": round(left, 1), "of_s": self.drain_timeout}

    @property
    def registered(self) -> bool:
        return any(agent.numbers.get("registered") for agent in self.agents)

    @property
    def inflight(self) -> int:
        return 0 if self.engine is None else int(self.engine.numbers.get("inflight", 0))


@dataclass(frozen=True)
class NodeState:
    """A state with its reason and what has to happen before it can change."""

    state: State
    reason: str = ""
    waiting_for: str = ""


def node_state(facts: Facts) -> NodeState:
    """The node's state. ``ready`` only with a ready engine, a healthy verdict on it and a registered agent."""
    alive = facts.program in ALIVE
    if facts.want == "stop":
        return _stopping(facts, alive)
    if facts.failed:
        return NodeState(State.FAILED, facts.failed, "`sgnode restart engine`")
    if alive and facts.held:
        return NodeState(State.FAILED, facts.held, "their end, then the engine is started again")
    if not alive or facts.death:
        return _without_engine(facts)
    if facts.program == "STOPPING":
        return NodeState(State.STOPPED, "the engine is being stopped", "the engine's end")
    if facts.engine is None:
        if facts.engine_lost:
            return NodeState(
                State.UNHEALTHY, "the engine's process lives but says nothing", f"a sign of life of the engine{_kill(facts)}"
            )
        return NodeState(State.STARTING, "the engine's process is starting", "the engine")
    if facts.engine.state != State.READY:
        return _engine_says(facts.engine)
    return _with_ready_engine(facts, facts.engine)


def is_stuck(facts: Facts) -> bool:
    """The engine lives and serves nobody: it says nothing, or its canaries fail."""
    if facts.program not in ALIVE or facts.death:
        return False
    if facts.engine is None:
        return facts.engine_lost
    verdict = facts.verdict
    judged = verdict is not None and verdict.incarnation == facts.engine.incarnation and not verdict.healthy
    return judged and facts.engine.state == State.READY


def _kill(facts: Facts) -> str:
    return "" if facts.killed_in is None else f", or its kill in {facts.killed_in:.0f} s"


def _stopping(facts: Facts, alive: bool) -> NodeState:
    if not alive:
        return NodeState(State.STOPPED, "the node is stopping")
    progress = _progress(facts) or facts.progress
    rest = "the leader's drain" if facts.progress else "the processes' end"
    return NodeState(State.DRAINING, progress or "the node is stopping", _streams(facts) or rest)


def _streams(facts: Facts) -> str:
    count = facts.streams
    return "" if not count else f"{count} running stream{'s' if count > 1 else ''}"


def _progress(facts: Facts) -> str:
    """What a drain still has to do, over all agents; empty when there is nothing to say."""
    drain = facts.drain
    if drain is None:
        return ""
    count = facts.streams
    if not count:
        return next(agent.detail for agent in facts.agents if agent.state == State.DRAINING)
    return f"draining: {count} stream{'s' if count > 1 else ''} left, {drain['left_s']:.0f} s of {drain['of_s']:.0f}"


def _without_engine(facts: Facts) -> NodeState:
    if facts.program in ("", "STOPPED") and not facts.started:
        if facts.condition:
            return NodeState(State.WAITING, "", facts.condition)
        return NodeState(State.STARTING, "", "the engine's start")
    if facts.program == "STOPPED":
        return NodeState(State.STOPPED, "the engine was stopped", "`sgnode restart engine`")
    reason = facts.death or "the engine is gone"
    if facts.condition:
        return NodeState(State.WAITING, reason, facts.condition)
    if facts.restart_in is not None:
        return NodeState(State.STARTING, reason, f"the next start in {max(0.0, facts.restart_in):.0f} s")
    return NodeState(State.STARTING, reason, "the end of what the engine left")


def _engine_says(engine: Beat) -> NodeState:
    try:
        state = State(engine.state)
    except ValueError:
        state = State.UNHEALTHY if engine.state == LOST else State.STARTING
    return NodeState(state, engine.detail, engine.waiting_for or ("" if state == State.FAILED else "the engine"))


def _with_ready_engine(facts: Facts, engine: Beat) -> NodeState:
    if not facts.needs_agents:
        return _follower(facts)
    if facts.want == "drain":
        if facts.registered or facts.streams or any(agent.state != State.DRAINED for agent in facts.agents):
            return NodeState(State.DRAINING, _progress(facts) or facts.why_wanted, _streams(facts) or "the agents")
        return NodeState(State.DRAINED, facts.why_wanted, "`sgnode resume`")
    verdict = facts.verdict
    if verdict is None or verdict.incarnation != engine.incarnation:
        return NodeState(State.WARMING, "the engine is ready", "the prober's first canary")
    if not verdict.healthy:
        return NodeState(State.UNHEALTHY, verdict.reason, f"a canary that succeeds{_kill(facts)}")
    if not facts.registered:
        waiting = next((agent.waiting_for for agent in facts.agents if agent.waiting_for), "")
        return NodeState(State.WARMING, "the engine is ready and healthy", waiting or "an agent's registration with Dynamo")
    return NodeState(State.READY)


def _follower(facts: Facts) -> NodeState:
    """Its streams are the leader's: a drain is done when the leader's is."""
    if facts.want != "drain":
        return NodeState(State.READY, f"the leader is {facts.leader_state}" if facts.leader_state else "")
    if facts.leader_state == State.DRAINED:
        return NodeState(State.DRAINED, facts.why_wanted, "`sgnode resume`")
    return NodeState(State.DRAINING, facts.progress or facts.why_wanted, "the leader")
