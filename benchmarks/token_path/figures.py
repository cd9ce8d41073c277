"""The arithmetic: what the requests of one load say, as plain numbers. Times in milliseconds, rates a second."""

from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from benchmarks.token_path.load import Request

Figures = dict[str, float | int | None]
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def steady(requests: Sequence[Request]) -> tuple[float, float] | None:
    """The window in which every stream goes on: from when the last stream's first request has ended to when the first
    stream has ended its last. None where there is none, as with one request a stream.
    """
    ends: dict[int, list[float]] = defaultdict(list)
    for request in requests:
        ends[request.stream].append(request.ended)
    begin, end = max(min(times) for times in ends.values()), min(max(times) for times in ends.values())
    return (begin, end) if end > begin else None


def tokens_within(request: Request, begin: float, end: float) -> float:
    """A request's tokens between two times: as many an arrival, each spread over the gap before it.

    Without that, streams in step which end just after the window would lose an arrival each, and it may be of many tokens.
    """
    arrivals = request.arrivals or array("d", [request.ended])

    def passed(at: float) -> float:
        """Arrivals so far, with the part of the gap that has passed."""
        whole = bisect_right(arrivals, at)
        if whole == len(arrivals) or at <= request.began:
            return whole
        last = arrivals[whole - 1] if whole else request.began
        return whole + (at - last) / (arrivals[whole] - last)

    return request.tokens * (passed(end) - passed(begin)) / len(arrivals)


def spread(name: str, seconds: np.ndarray) -> Figures:
    """Quantiles by nearest rank, in ms; None of nothing."""
    if not len(seconds):
        return {f"{name}_{key}": None for key in QUANTILES}
    ordered = np.sort(seconds) * 1e3
    ranks = {key: min(len(ordered) - 1, int(len(ordered) * q)) for key, q in QUANTILES.items()}
    return {f"{name}_{key}": round(float(ordered[rank]), 3) for key, rank in ranks.items()}


def figures(requests: Sequence[Request]) -> Figures:
    """One load's figures.

    ``tokens_per_s`` is of the steady window (``window_s`` long), of the whole load where there is none (``window_s`` None);
    ``tokens_per_s_whole``, TTFT, ITL and the rest are of the whole. ITL is between arrivals, so chunks that come together
    count as one. Raises ValueError for a load without requests.
    """
    if not requests:
        raise ValueError("a load without requests")
    whole = max(r.ended for r in requests) - min(r.began for r in requests)
    tokens, chunks = sum(r.tokens for r in requests), sum(r.chunks for r in requests)
    window = steady(requests)
    rate = tokens / whole if window is None else sum(tokens_within(r, *window) for r in requests) / (window[1] - window[0])
    seen = [np.frombuffer(r.arrivals) for r in requests if r.arrivals]
    arrivals = sum(len(times) for times in seen)
    ttft = np.array([r.arrivals[0] - r.began for r in requests if r.arrivals])
    gaps = np.concatenate([np.diff(times) for times in seen]) if seen else np.empty(0)
    return {
        "requests": len(requests),
        "tokens": tokens,
        "seconds": round(whole, 4),
        "window_s": None if window is None else round(window[1] - window[0], 4),
        "tokens_per_s": round(rate, 1),
        "tokens_per_s_whole": round(tokens / whole, 1),
        "requests_per_s": round(len(requests) / whole, 3),
        **spread("ttft", ttft),
        **spread("itl", gaps),
        "tokens_per_chunk": round(tokens / chunks, 3) if seen else None,
        "tokens_per_arrival": round(tokens / arrivals, 3) if seen else None,
    }
