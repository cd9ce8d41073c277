"""Latencies as an agent sees them: from a request's arrival to its first token, and from token to token.

One counter a chunk (0.3 µs); quantiles and Prometheus histograms are made of the counters when somebody asks.
"""

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString

TTFT_BUCKETS = (0.0, 0.0022, 0.0047, 0.01, 0.022, 0.047, 0.1, 0.22, 0.47, 1.0, 2.2, 4.7, 10.0, 22.0, 48.0, 100.0, 220.0, 480.0)
ITL_BUCKETS = (
    0.0, 0.0018, 0.0033, 0.0059, 0.011, 0.02, 0.035, 0.064, 0.12, 0.21, 0.38, 0.69, 1.2, 2.3, 4.1, 7.4, 13.0, 24.0, 44.0, 80.0,
)  # fmt: skip
"""Seconds, as the frontend of Dynamo 1.6.1 has them (dynamo_frontend_time_to_first_token_seconds and its kin)."""
GRID = tuple(1e-4 * 1.1**i for i in range(162))
"""Between the buckets, for quantiles: 0.1 ms to 8 min in steps of 10 %."""
WINDOW_SECONDS = 15.0
"""What "recent" means in a Beat."""
SLICE_SECONDS = 2.5
"""The window moves in such steps."""


class Durations:
    """Counts of durations (seconds) by size, since this process began and over the last WINDOW_SECONDS."""

    def __init__(self, buckets: Sequence[float], clock: Callable[[], float]) -> None:
        self._buckets = buckets
        self._clock = clock
        self._bounds = sorted({*buckets, *GRID})
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        self._earlier: deque[tuple[float, list[int]]] = deque([(clock(), list(self._counts))])

    def add(self, seconds: float, count: int = 1) -> None:
        """``count`` durations of ``seconds`` each."""
        self._counts[bisect_left(self._bounds, seconds)] += count
        self._sum += seconds * count

    def recent(self) -> list[int]:
        """Counts of the window, by bound."""
        now = self._clock()
        earlier = self._earlier
        if now - earlier[-1][0] >= SLICE_SECONDS:
            earlier.append((now, list(self._counts)))
        while len(earlier) > 1 and earlier[1][0] <= now - WINDOW_SECONDS:
            earlier.popleft()
        return [count - before for count, before in zip(self._counts, earlier[0][1], strict=True)]

    def numbers(self, name: str) -> dict[str, float]:
        """``NAME_p50_seconds``, ``NAME_p99_seconds`` of the window and ``NAME_samples``; nothing when nothing came."""
        counts = self.recent()
        total = sum(counts)
        if not total:
            return {}
        found = {f"{name}_p{percent}_seconds": self._quantile(counts, total * percent / 100) for percent in (50, 99)}
        return {**found, f"{name}_samples": float(total)}

    def _quantile(self, counts: list[int], target: float) -> float:
        """The duration that ``target`` of them don't exceed, straight between two bounds."""
        for index, count in enumerate(counts):
            if count and count >= target:
                if index == len(self._bounds):
                    break
                below = self._bounds[index - 1] if index else 0.0
                return below + (self._bounds[index] - below) * target / count
            target -= count
        return self._bounds[-1]

    def family(self, name: str, documentation: str, model: str) -> HistogramMetricFamily:
        """As a Prometheus histogram with Dynamo's buckets."""
        counts = list(self._counts)  # a scrape comes from a thread of Dynamo's runtime
        cumulated, at, buckets = 0, 0, []
        for bound in self._buckets:
            index = bisect_left(self._bounds, bound) + 1
            cumulated += sum(counts[at:index])
            buckets.append((floatToGoString(bound), cumulated))
            at = index
        buckets.append(("+Inf", sum(counts)))
        family = HistogramMetricFamily(name, documentation, labels=["model"])
        family.add_metric([model], buckets, self._sum)
        return family


class Latency:
    """All requests of an agent. A collector of prometheus_client."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.ttft = Durations(TTFT_BUCKETS, clock)
        self.itl = Durations(ITL_BUCKETS, clock)
        self.model = ""

    def request(self) -> "Timing":
        """A request that arrives now."""
        return Timing(self)

    def numbers(self) -> dict[str, float]:
        """For the Beat: what the last seconds were like."""
        return {**self.ttft.numbers("ttft"), **self.itl.numbers("itl")}

    def collect(self) -> Iterator[HistogramMetricFamily]:
        yield self.ttft.family(
            "sgnode_time_to_first_token_seconds", "From a request's arrival at the agent to its first token", self.model
        )
        yield self.itl.family("sgnode_inter_token_latency_seconds", "From token to token of a stream, at the agent", self.model)


class Timing:
    """One request's chunks."""

    __slots__ = ("_arrived", "_last", "_latency")

    def __init__(self, latency: Latency) -> None:
        self._latency = latency
        self._arrived = latency.clock()
        self._last: dict[int, float] = {}
        """When each sample's newest token came."""

    def chunk(self, index: int, tokens: int, now: float) -> None:
        """New tokens of a sample. Several at once count as evenly spaced since its last chunk (dynamo.frontend 1.6.1)."""
        if not tokens:
            return
        latency, last = self._latency, self._last
        before = last.get(index)
        if before is not None:
            latency.itl.add((now - before) / tokens, tokens)
        elif not last:
            latency.ttft.add(now - self._arrived)
        last[index] = now
