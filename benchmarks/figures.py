"""Quantiles of a benchmark's figures."""


def quantile(values: list[float], q: float) -> float:
    """The q-quantile by nearest rank; 0 for no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))] if ordered else 0.0
