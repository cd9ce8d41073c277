"""Latencies at the agent: quantiles of a moving window, Dynamo's buckets, what counts as a gap, and what it costs."""

import random
import time

from prometheus_client import CollectorRegistry, generate_latest

from procs.agent.latency import ITL_BUCKETS, TTFT_BUCKETS, WINDOW_SECONDS, Durations, Latency


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_quantiles_are_within_five_percent_of_the_exact_ones() -> None:
    clock = Clock()
    durations = Durations(ITL_BUCKETS, clock)
    dice = random.Random(6)
    values = sorted(dice.lognormvariate(-4, 1) for _ in range(10_000))
    for value in values:
        durations.add(value)
    found = durations.numbers("itl")
    assert found["itl_samples"] == 10_000
    for percent in (50, 99):
        exact = values[int(len(values) * percent / 100)]
        assert abs(found[f"itl_p{percent}_seconds"] / exact - 1) < 0.05, (percent, found, exact)


def test_the_window_forgets_and_an_idle_agent_says_nothing() -> None:
    clock = Clock()
    durations = Durations(TTFT_BUCKETS, clock)
    assert durations.numbers("ttft") == {}
    durations.add(8.0, 5)
    for _ in range(40):
        durations.numbers("ttft")
        clock.now += 0.5
        if clock.now == 110.0:
            durations.add(0.1)
    found = durations.numbers("ttft")
    assert found["ttft_samples"] == 1 and 0.09 < found["ttft_p99_seconds"] < 0.11, "the slow ones are 20 s old"
    for _ in range(40):
        clock.now += 0.5
        last = durations.numbers("ttft")
    assert last == {} and WINDOW_SECONDS < 20


def test_beyond_the_last_bound_is_said_as_that() -> None:
    durations = Durations(TTFT_BUCKETS, Clock())
    durations.add(10_000.0)
    assert durations.numbers("ttft")["ttft_p50_seconds"] == 480.0


def test_a_chunk_of_several_tokens_is_that_many_even_gaps_and_samples_have_gaps_of_their_own() -> None:
    clock = Clock()
    latency = Latency(clock)
    timing = latency.request()
    for later, index, tokens in ((0.2, 0, 3), (0.1, 1, 1), (0.1, 0, 4), (0.3, 1, 1), (1.0, 0, 0)):
        clock.now += later
        timing.chunk(index, tokens, clock())
    registry = CollectorRegistry()
    latency.model = "m"
    registry.register(latency)
    text = generate_latest(registry).decode()
    # 0: first after 0.2 s; then 4 tokens in 0.2 s. 1: no first token of the request; then 1 in 0.4 s. The end has no token.
    assert 'sgnode_time_to_first_token_seconds_count{model="m"} 1.0' in text
    assert 'sgnode_time_to_first_token_seconds_bucket{le="0.22",model="m"} 1.0' in text
    assert 'sgnode_time_to_first_token_seconds_bucket{le="0.1",model="m"} 0.0' in text
    assert 'sgnode_inter_token_latency_seconds_count{model="m"} 5.0' in text
    assert 'sgnode_inter_token_latency_seconds_bucket{le="0.064",model="m"} 4.0' in text
    assert abs(latency.itl._sum - 0.6) < 1e-9 and abs(latency.ttft._sum - 0.2) < 1e-9
    numbers = latency.numbers()
    assert numbers["itl_samples"] == 5 and abs(numbers["itl_p50_seconds"] / 0.05 - 1) < 0.1


def test_a_duration_on_a_bucket_is_inside_it() -> None:
    latency = Latency(Clock())
    for bound in ITL_BUCKETS:
        latency.itl.add(bound)
    buckets = {s.labels["le"]: s.value for f in latency.collect() for s in f.samples if s.name.endswith("latency_seconds_bucket")}
    assert list(buckets.values()) == [*range(1, len(ITL_BUCKETS) + 1), len(ITL_BUCKETS)]


def test_a_chunk_costs_next_to_nothing() -> None:
    latency = Latency()
    timing = latency.request()
    best = 1.0
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(10_000):
            timing.chunk(0, 1, latency.clock())
        best = min(best, (time.perf_counter() - began) / 10_000)
    print(f"{best * 1e9:.0f} ns a chunk")
    assert best < 5e-6  # ten times what it takes
