"""What one load of N streams gave: tokens/s, TTFT and ITL, and how they are printed."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Stream:
    """One finished stream. Times in seconds; ``gaps`` between chunks."""

    ttft: float
    gaps: list[float]
    tokens: int


@dataclass
class Figures:
    """One load: rates in tokens per second, times in milliseconds."""

    streams: int
    tokens_per_s: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float

    def as_dict(self) -> dict[str, Any]:
        return {key: round(value, 3) for key, value in asdict(self).items()}


def quantile(values: list[float], q: float) -> float:
    """The q-quantile by nearest rank; 0 for no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))] if ordered else 0.0


def figures(streams: list[Stream], seconds: float) -> Figures:
    """Summarise the streams of one load that took ``seconds`` from first request to last token."""
    ttft = [s.ttft * 1e3 for s in streams]
    gaps = [gap * 1e3 for s in streams for gap in s.gaps]
    return Figures(
        streams=len(streams),
        tokens_per_s=sum(s.tokens for s in streams) / seconds,
        ttft_p50=quantile(ttft, 0.5),
        ttft_p99=quantile(ttft, 0.99),
        itl_p50=quantile(gaps, 0.5),
        itl_p99=quantile(gaps, 0.99),
    )


def prompt(seed: int, length: int, vocab_size: int) -> list[int]:
    """A prompt of token ids that no other seed shares a prefix with; special tokens (below 10) left out."""
    return [(seed * 7919 + i * 31) % (vocab_size - 10) + 10 for i in range(length)]


def median(values: list[float]) -> float:
    return quantile(values, 0.5)
