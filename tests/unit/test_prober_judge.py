"""What counts for and against an engine, on a clock of the test's own: counters as SGLang's schedulers give them."""

from collections.abc import Callable
from typing import Any

import pytest

from procs.prober.judge import FIRST_SECONDS, STRIKES, Detokenizer, Limits, Rank, WayOut, blocked, work_of
from shared.frames import Beat

LIMITS = Limits(wait=10, timeout=30, busy_stall=60)
TICK = 0.5


def beat(**numbers: float) -> Beat:
    return Beat(
        "engine", 1, "ready", "", 0.0, "", 1, 0, {f"scheduler_{k}_dp0" if k in OF_A_RANK else k: v for k, v in numbers.items()}
    )


OF_A_RANK = ("steps", "outputs", "loops", "transfers", "step_seconds")


class World:
    """A rank that is heard twice a second, with a canary that is never answered."""

    def __init__(self, *, known: bool = True) -> None:
        self.now = 1000.0
        self.rank = Rank(LIMITS, 0, self.now, known=known)
        self.sent: float | None = None
        self.strikes: list[tuple[float, str]] = []

    def run(self, seconds: float, **rates: Any) -> None:
        """A callable is asked for its value by the seconds since the start of this run; a number is the value."""
        began = self.now
        while self.now < began + seconds:
            self.now += TICK
            numbers = {k: v(self.now - began) if callable(v) else v for k, v in {"steps": 1.0, **rates}.items()}
            self.rank.hear(beat(**numbers), self.now, flows=bool(rates.get("flows")))
            if self.sent is None:
                if self.rank.due(self.now, canaries=True):
                    self.sent = self.now
            elif problem := self.rank.late(self.sent, self.now):
                self.strikes.append((self.now - began, problem))
                self.sent = None
                self.rank.failed(problem, self.now, again=True)


def healthy() -> World:
    world = World()
    world.rank.hear(beat(steps=1), world.now, flows=True)
    world.rank.answered(world.now)
    return world


def test_an_idle_engine_gets_a_canary_each_wait_and_a_working_one_none() -> None:
    world = healthy()
    assert not world.rank.due(world.now + 9, canaries=True) and world.rank.due(world.now + 10, canaries=True)
    assert not world.rank.due(world.now + 1e6, canaries=False), "DYN_HEALTH_CHECK_ENABLED=false"
    world.run(100, steps=lambda t: t)
    assert world.sent is None


def test_a_dead_idle_engine_is_unhealthy_after_two_canaries() -> None:
    world = healthy()
    world.run(80)
    assert [round(at) for at, _ in world.strikes] == [40, 70] and world.rank.fine is False
    assert "no step" in world.rank.reason and "DP rank 0" in world.rank.reason


@pytest.mark.parametrize(
    "what",
    [
        pytest.param({"steps": lambda t: t // 0.5}, id="chunked prefill"),
        pytest.param({"steps": 2.0, "step_seconds": lambda t: t}, id="one step"),
        pytest.param({"controls": 1.0}, id="weights update"),
        pytest.param({"transfers": 3.0, "loops": lambda t: t * 1e4}, id="KV transfers"),
    ],
)
def test_no_strike_while_something_goes_on_for_59_s(what: dict[str, Any]) -> None:
    world = healthy()
    world.sent = world.now  # sent just before
    world.run(59, **what)
    assert world.strikes == [] and world.rank.fine


def test_a_step_of_more_than_the_stall_limit_is_a_strike_and_the_next_canary_another() -> None:
    world = healthy()
    world.run(100, steps=2.0, step_seconds=lambda t: t)
    assert [round(at) for at, _ in world.strikes] == [60, 90] and world.rank.fine is False
    assert "in one step for" in world.rank.reason


def test_a_long_step_that_has_just_ended_was_no_idleness() -> None:
    """Its token is on its way: the canary has its whole time from there."""
    world = healthy()
    world.run(50, steps=2.0, step_seconds=lambda t: t)
    world.run(29, steps=2.0, step_seconds=0.0)
    assert world.strikes == []
    world.run(2, steps=2.0, step_seconds=0.0)
    assert len(world.strikes) == 1


def test_a_loop_that_stands_still_with_transfers_is_no_excuse() -> None:
    world = healthy()
    world.run(80, transfers=3.0, loops=5.0)
    assert len(world.strikes) == STRIKES


def test_an_old_word_on_a_step_ages() -> None:
    world = healthy()
    world.rank.hear(beat(steps=2, step_seconds=5), world.now, flows=False)
    assert world.rank.late(world.now, world.now + 40) == "" and "one step for 65 s" in world.rank.late(world.now, world.now + 60)


def test_one_strike_is_forgotten_when_tokens_come_and_two_need_a_canary() -> None:
    world = healthy()
    assert world.rank.failed("x", world.now, again=False) and world.rank.fine
    world.run(1, steps=lambda t: 2 + t, flows=True)
    assert world.rank.failed("x", world.now, again=False), "the first one again"
    assert not world.rank.failed("y", world.now, again=False) and world.rank.reason == "y"
    world.run(9, steps=lambda t: 9 + t, flows=True)
    assert world.rank.fine is False and world.sent is None
    world.run(2, steps=lambda t: 99 + t, flows=True)
    assert world.sent is not None, "while it is unhealthy also a working engine gets canaries"
    world.rank.answered(world.now)
    assert world.rank.fine and world.rank.reason == ""


def test_the_first_canary_of_an_engine_has_its_own_time_and_no_second_chance() -> None:
    world = World(known=False)
    world.run(FIRST_SECONDS - 5, steps=0.0)
    assert world.strikes == [] and world.rank.fine is None
    world.run(10, steps=0.0)
    assert world.rank.fine is False and len(world.strikes) == 1


def test_counters_by_rank_together_and_of_an_engine_without_them() -> None:
    numbers = {"scheduler_steps_dp0": 3.0, "scheduler_steps_dp1": 4.0, "scheduler_step_seconds_dp1": 7.0, "steps": 99.0}
    assert [work_of(numbers, rank).steps for rank in (0, 1, None)] == [3, 4, 7]
    assert [work_of(numbers, rank).step_seconds for rank in (0, 1, None)] == [0, 7, 7]
    assert work_of({"steps": 99.0}, 0).steps == 99


def way(**numbers: float) -> Beat:
    named = {"handed": "scheduler_outputs_dp0", "sampled_at": "scheduler_sampled_at_dp0"}
    return Beat("engine", 1, "ready", "", 0.0, "", 1, 0, {named.get(k, k): v for k, v in numbers.items()})


def way_out(seconds: float, **rates: Any) -> tuple[list[float], bool]:
    out, now, lost, unhealthy = WayOut(LIMITS), 0.0, list[float](), False
    while now < seconds:
        now += TICK
        numbers = {"inflight": 1.0, "handed": 0.0, "outputs": 0.0, **{k: v(now) if callable(v) else v for k, v in rates.items()}}
        out.hear(way(**{"scheduler_steps_dp0": now, **numbers}), now)
        if out.lost(now):
            lost.append(round(now))
            unhealthy = not out.strike()
    return lost, unhealthy


def test_tokens_that_never_come_out_are_two_strikes_in_twice_the_canarys_time() -> None:
    assert way_out(65, handed=lambda t: t) == ([31, 62], True)


@pytest.mark.parametrize(
    "what",
    [
        pytest.param({"handed": lambda t: t, "outputs": lambda t: t}, id="they come out"),
        pytest.param({"handed": lambda t: t, "outputs": lambda t: t // 20}, id="late"),
        pytest.param({"handed": lambda t: t, "inflight": 0.0}, id="nobody waits"),
        pytest.param({"handed": lambda t: t, "controls": 1.0}, id="a control"),
        pytest.param({"handed": 5.0}, id="none handed out"),
        pytest.param(
            {"outputs": lambda t: t // 40, "handed": lambda t: (t - TICK) // 40, "sampled_at": lambda t: t - TICK},
            id="they are out before the scheduler's file says that they were handed out",
        ),
    ],
)
def test_no_way_out_is_lost(what: dict[str, Any]) -> None:
    assert way_out(300, **what) == ([], False)


def test_what_is_handed_out_after_the_last_that_came_out_counts_by_a_late_sample_as_well() -> None:
    late = {"handed": lambda t: t - 0.2, "sampled_at": lambda t: t - 0.2}
    assert way_out(70, outputs=lambda t: min(t, 5.0), **late) == ([36, 66], True)


def test_one_output_for_an_aborted_request_beside_a_long_prefill_is_one_strike_only() -> None:
    assert way_out(300, handed=lambda t: float(t > 1)) == ([32], False)


@pytest.mark.parametrize(
    ("given", "back", "strikes"),
    [
        pytest.param(lambda t: t, lambda t: 0, [31, 61], id="hangs"),
        pytest.param(lambda t: 7.0, lambda t: min(t, 6.0), [36, 66], id="hangs with one"),
        pytest.param(lambda t: t, lambda t: t, [], id="works"),
        pytest.param(lambda t: t, lambda t: t // 20, [], id="is slow"),
        pytest.param(lambda t: 0, lambda t: 0, [], id="is not needed"),
    ],
)
def test_a_detokenizer_is_judged_by_what_it_gives_back(
    given: Callable[[float], float], back: Callable[[float], float], strikes: list[int]
) -> None:
    """Beside tokens that flow past it."""
    way_of, now, found = Detokenizer(LIMITS), 0.0, list[int]()
    while now < 70:
        now += TICK
        numbers = {"scheduler_to_detokenizer_dp0": given(now), "from_detokenizer": back(now), "outputs": now, "inflight": 3.0}
        way_of.hear(way(**numbers), now)
        if way_of.lost(now):
            found.append(round(now))
            assert way_of.strike() is (len(found) == 1)
    assert found == pytest.approx(strikes, abs=1)


def test_a_blocked_loop_is_known_by_its_lag() -> None:
    assert blocked(beat(loop_lag=9.0), LIMITS) == "" and "not turned for 11 s" in blocked(beat(loop_lag=11.0), LIMITS)
    assert blocked(beat(loop_lag=2.0), Limits(1, 1.5, 60)), "shortened with the canary's time"


def test_tokens_that_come_out_after_all_forget_the_first_strike() -> None:
    assert way_out(120, handed=lambda t: t, outputs=lambda t: t // 40) == ([31, 70, 110], False)
