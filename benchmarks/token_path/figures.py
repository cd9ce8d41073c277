"""The arithmetic: what the requests of one load say, as plain numbers. Times in milliseconds, rates a second."""

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
    """A request's tokens between two times: by its arrivals, evenly, or by its duration where those were not seen."""
    if request.ended <= begin or request.began >= end:
        return 0.0
    if request.began > begin and request.ended <= end:
        return request.tokens
    if request.arrivals:
        inside = bisect_right(request.arrivals, end) - bisect_right(request.arrivals, begin)
        return request.tokens * inside / len(request.arrivals)
    inside_s = min(request.ended, end) - max(request.began, begin)
    return request.tokens * inside_s / (request.ended - request.began)


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
