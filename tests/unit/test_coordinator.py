"""The coordinator's pure rooms: restart policy, the engine program's life, the node's state, the status document."""

from typing import Any

import pytest

from procs.coordinator import conditions, document
from procs.coordinator.engine import EngineProgram
from procs.coordinator.node import Facts, NodeState, is_stuck, node_state
from procs.coordinator.restart import FollowerPolicy, RestartPolicy
from shared.config import LEFT_BEHIND_EXIT, NodeConfig
from shared.frames import Beat, Verdict
from shared.hang import Hangs
from shared.state import Board, State


def beat(process: str, state: str = "ready", *, incarnation: int = 1, waiting_for: str = "", **numbers: float) -> Beat:
    return Beat(process, 7, state, "", 0.0, waiting_for, incarnation, 0, numbers)


HEALTHY = Verdict(1, True, "")
DRAINING = beat("agent:1", "draining", inflight=2, drain_left_seconds=287.4)


def facts(**changes: Any) -> Facts:
    ready: dict[str, Any] = {
        "program": "RUNNING",
        "started": True,
        "engine": beat("engine", inflight=2),
        "verdict": HEALTHY,
        "agents": [beat("agent:0", registered=1)],
    }
    return Facts(**(ready | changes))


@pytest.mark.parametrize(
    ("changes", "state", "waiting_for"),
    [
        ({}, "ready", ""),
        ({"program": "", "started": False, "engine": None}, "starting", "start"),
        ({"program": "STOPPED", "started": False, "engine": None, "condition": "rank 0"}, "waiting", "rank 0"),
        ({"program": "STOPPED", "engine": None}, "stopped", "restart"),
        ({"program": "STOPPING"}, "stopped", "end"),
        ({"engine": None}, "starting", "engine"),
        ({"engine": None, "engine_lost": True}, "unhealthy", "engine"),
        ({"engine": beat("engine", "loading")}, "loading", "engine"),
        ({"engine": beat("engine", "warming", waiting_for="graphs")}, "warming", "graphs"),
        ({"engine": beat("engine", "dreaming")}, "starting", "engine"),
        ({"verdict": None}, "warming", "canary"),
        ({"verdict": Verdict(0, True, "")}, "warming", "canary"),
        ({"verdict": Verdict(1, False, "no token")}, "unhealthy", "canary"),
        ({"agents": []}, "warming", "registration"),
        ({"agents": [beat("agent:0", waiting_for="discovery")]}, "warming", "discovery"),
        ({"agents": [beat("agent:0"), beat("agent:1", registered=1)]}, "ready", ""),
        ({"agents": [], "verdict": None, "needs_agents": False}, "ready", ""),
        ({"want": "drain", "agents": [DRAINING]}, "draining", "2 running streams"),
        ({"want": "drain", "agents": [beat("agent:0", "drained")]}, "drained", "resume"),
        ({"want": "drain", "agents": [beat("agent:0", "drained"), DRAINING]}, "draining", "2 running streams"),
        ({"want": "stop", "agents": [DRAINING]}, "draining", "2 running streams"),
        ({"want": "stop", "program": "STOPPED"}, "stopped", ""),
        ({"failed": "crash loop", "program": "EXITED"}, "failed", "restart"),
        ({"death": "scheduler killed"}, "starting", "left"),
        ({"death": "scheduler killed", "program": "EXITED", "restart_in": 3.6}, "starting", "4 s"),
        ({"program": "EXITED", "restart_in": 1.0, "condition": "rank 0"}, "waiting", "rank 0"),
    ],
)
def test_node_state(changes: dict[str, Any], state: str, waiting_for: str) -> None:
    node = node_state(facts(**changes))
    assert node.state == state
    assert waiting_for in node.waiting_for
    assert (node.state == State.READY) == (node.waiting_for == "") or node.state == State.STOPPED


def test_the_progress_of_a_drain_is_over_all_agents() -> None:
    other = beat("agent:0", "draining", inflight=10, drain_left_seconds=120.0)
    for want in ("drain", "stop"):
        node = node_state(facts(want=want, agents=[DRAINING, other], drain_timeout=300.0))
        assert node.reason == "draining: 12 streams left, 287 s of 300"


def test_the_first_unmet_condition_is_named() -> None:
    assert conditions.waiting_for([]) == ""
    assert conditions.waiting_for([lambda: None, lambda: "a", lambda: "b"]) == "a"


def test_back_off_grows_and_a_good_life_resets_it() -> None:
    policy = RestartPolicy()
    now, delays = 0.0, []
    for _ in range(8):
        now += 200
        delays.append(policy.died(now))
    assert delays == [0, 1, 2, 4, 8, 16, 32, 60]
    policy.ready(now)
    policy.ready(now + 250)
    assert policy.died(now + 299) == 60
    policy.ready(now + 400)
    policy.ready(now + 700)
    assert policy.died(now + 701) == 0


def test_deaths_that_go_on_for_days_change_nothing() -> None:
    policy = RestartPolicy()
    delays = [policy.died(200.0 * number) for number in range(2000)]
    assert set(delays[8:]) == {60.0} and len(policy.deaths) < 20


def test_five_deaths_in_ten_minutes_are_a_crash_loop() -> None:
    policy = RestartPolicy()
    assert [policy.died(now) for now in (0.0, 10.0, 20.0, 601.0, 602.0)] == [0, 1, 2, 4, 8]
    assert policy.died(603.0) is None
    policy.reset()
    assert policy.died(605.0) == 0


def test_only_who_hangs_long_enough_is_killed_and_a_pause_of_our_own_counts_for_nothing() -> None:
    hangs = Hangs(20.0)
    now = 0.0

    def look(engine: bool = True, silent: tuple[str, ...] = ("agent:0",)) -> list[str]:
        return hangs.look(now, engine_stuck=engine, silent=silent)

    assert look() == []
    now = 1000.0  # paused
    assert look() == []
    killed = []
    for _ in range(30):
        now += 1.0
        killed += [(name, now - 1000.0) for name in look()]
    assert killed == [("agent:0", 14.0), ("engine", 19.0), ("agent:0", 29.0)]
    look()
    assert look(engine=False, silent=()) == [] and hangs.engine_left() is None
    assert Hangs(0.0).look(0.0, engine_stuck=True, silent=()) == []


@pytest.mark.parametrize(
    ("changes", "stuck"),
    [
        ({}, False),
        ({"engine": None, "engine_lost": True}, True),
        ({"engine": None}, False),
        ({"verdict": Verdict(1, False, "no token")}, True),
        ({"verdict": Verdict(1, False, "no token"), "death": "killed"}, False),
        ({"verdict": Verdict(1, False, "no token"), "engine": beat("engine", "loading")}, False),
        ({"verdict": Verdict(0, False, "no token")}, False),
        ({"program": "EXITED", "engine": None, "engine_lost": True}, False),
    ],
)
def test_an_engine_is_stuck_only_while_it_lives_and_serves_nobody(changes: dict[str, Any], stuck: bool) -> None:
    assert is_stuck(facts(**changes)) is stuck


def info(state: str, pid: int = 0, start: int = 100, exitstatus: int = 1) -> dict[str, Any]:
    return {"statename": state, "pid": pid, "start": start, "exitstatus": exitstatus, "spawnerr": ""}


def test_the_engine_is_started_once_and_again_after_its_back_off() -> None:
    deaths: list[str] = []
    program = EngineProgram(RestartPolicy(), deaths.append)
    assert program.look(info("STOPPED", start=0), 0.0, "")
    program.starting()
    assert not program.look(info("RUNNING", 5), 0.1, "")
    assert program.look(info("EXITED"), 10.0, "scheduler killed")
    assert program.restart_at == 10.0, "the first restart waits for nothing"
    program.starting()
    # Dead before anybody looked: that is a second death, not a reason to start at once.
    assert not program.look(info("EXITED"), 11.0, "")
    assert program.restart_at == 12.0
    assert not program.look(info("EXITED"), 11.5, "")
    assert program.look(info("EXITED"), 12.0, "")
    assert deaths == ["scheduler killed", "the keeper exited with code 1"]


def test_what_cannot_be_killed_is_a_failure_at_once() -> None:
    program = EngineProgram(RestartPolicy())
    program.look(info("RUNNING", 5), 0.0, "")
    assert not program.look(info("EXITED", exitstatus=LEFT_BEHIND_EXIT), 40.0, "")
    assert "can't be killed" in program.failed and not program.look(info("EXITED", exitstatus=LEFT_BEHIND_EXIT), 99.0, "")
    # It may be gone a minute later: a try is no death.
    assert program.look(info("EXITED", exitstatus=LEFT_BEHIND_EXIT), 100.0, "")
    program.starting()
    program.look(info("RUNNING", 6), 100.1, "")
    assert program.failed == "" and program.policy.deaths == []


def test_a_coordinator_that_died_between_start_and_word_takes_no_start_for_a_persons() -> None:
    program = EngineProgram(RestartPolicy())
    program.policy.deaths, program.restart_at = [0.0, 5.0], 6.0
    program.look(info("RUNNING", 5), 7.0, "")
    assert len(program.policy.deaths) == 2
    program.look(info("EXITED"), 8.0, "")
    assert program.restart_at == 10.0


def test_a_start_that_supervisord_refuses_is_tried_with_back_off_and_not_for_ever() -> None:
    program = EngineProgram(RestartPolicy())
    due = []
    for tick in range(4000):
        now = tick / 10
        if program.look(info("STOPPED", start=0), now, ""):
            program.starting()
            program.not_started("no such file", now)
            due.append(now)
    assert due == [0.0, 0.1, 1.1, 3.1, 7.1] and "crash loop" in program.failed and "no such file" in program.failed


def test_an_end_that_is_wanted_is_no_death() -> None:
    deaths: list[str] = []
    program = EngineProgram(RestartPolicy(), deaths.append)
    program.look(info("RUNNING", 5), 0.0, "")
    program.ending("rank 1 is stopping")
    assert program.look(info("EXITED"), 1.0, "was killed") and not deaths and not program.policy.deaths
    program.starting()
    program.look(info("RUNNING", 6), 2.0, "")
    assert program.look(info("EXITED"), 3.0, "boom") and deaths == ["boom"], "the next one is"


def test_a_follower_s_engine_waits_for_the_next_epoch_and_counts_nothing() -> None:
    program = EngineProgram(FollowerPolicy())
    for number in range(9):
        program.look(info("RUNNING", 5 + number), float(number), "")
        assert program.look(info("EXITED"), number + 0.5, "boom"), "due at once, when its condition is met"
        program.starting()
    assert not program.failed


def test_a_follower_is_ready_with_its_engine_and_drains_with_the_leader() -> None:
    alone: dict[str, Any] = {"agents": [], "verdict": None, "needs_agents": False}
    assert node_state(facts(**alone, leader_state="loading")) == NodeState(State.READY, "the leader is loading")
    draining = node_state(facts(**alone, want="drain", leader_state="draining", progress="draining: 3 streams left, 9 s of 300"))
    assert (draining.state, draining.reason) == (State.DRAINING, "draining: 3 streams left, 9 s of 300")
    assert node_state(facts(**alone, want="drain", leader_state="drained")).state == State.DRAINED
    stopping = node_state(facts(**alone, want="stop", progress="draining: 3 streams left, 9 s of 300"))
    assert stopping.reason.startswith("draining: 3")


def test_a_person_may_stop_the_engine_and_end_a_crash_loop() -> None:
    program = EngineProgram(RestartPolicy())
    assert not program.look(info("RUNNING", 5), 0.0, "")
    assert not program.look(info("STOPPED"), 1.0, "")
    assert not program.look(info("STOPPED"), 99.0, "")
    program.policy.deaths = [98.0]
    program.look(info("RUNNING", 6), 99.5, "")
    assert program.policy.deaths == [], "a restart by hand counts nothing that was before"
    program.policy.deaths = [99.5]
    program.look(info("RUNNING", 7), 99.6, "")
    assert program.policy.deaths == [], "nor does one between two looks"
    for now in range(5):
        program.look(info("RUNNING", 10 + now), 100.0 + now, "")
        program.look(info("EXITED"), 100.5 + now, "boom")
        if program.restart_at is not None:
            program.starting()
    assert "boom" in program.failed
    assert not program.look(info("EXITED"), 9999.0, "")
    program.look(info("RUNNING", 77), 10000.0, "")
    assert program.failed == ""
    program.look(info("EXITED"), 10001.0, "")
    assert program.restart_at == 10001.0


def test_document_has_a_row_for_each_process() -> None:
    config = NodeConfig(
        name="n", runtime_dir="/r", version="1", role="aggregated", model_path="m", served_model_name="m", agents=2, frontend=True
    )
    board = Board()
    board.hear(beat("agent:0", registered=1))
    made = document.build(config, board, facts(), NodeState(State.READY), since=1.0, incarnation=3, crashes=document.Crashes())
    assert [row["name"] for row in made["processes"]] == [
        "coordinator", "relay", "keeper", "engine", "prober", "agent:0", "agent:1", "frontend",
    ]  # fmt: skip
    assert made["processes"][5]["pid"] == 7
    assert (made["registered"], made["inflight"], made["incarnation"]) == (True, 2, 3)
    assert set(made) >= {"name", "version", "role", "node_rank", "state", "reason", "since", "epoch", "ports"}
