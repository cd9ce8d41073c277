"""What a load is, what one request of it gave, and the prompts that it sends."""

from array import array
from dataclasses import dataclass, field

SPECIAL = 10
"""Token ids below are the tokenizers' special tokens; no prompt has them."""


@dataclass(frozen=True)
class Load:
    """One load. Closed loop: ``streams`` that send ``requests`` each, one after another. Open loop: ``rate`` > 0."""

    streams: int
    requests: int
    input: int
    output: int
    vocab: int
    seed: int
    """Its first prompt; a load takes the numbers from there on."""
    at_most: float = 600.0
    """Seconds after which no request is started."""
    rate: float = 0.0
    """Requests a second, as a Poisson process, for ``at_most`` seconds; ``streams`` and ``requests`` mean nothing then."""


@dataclass
class Request:
    """One finished request; times are time.monotonic(), which all processes of a host share."""

    stream: int
    began: float
    ended: float = 0.0
    arrivals: "array[float]" = field(default_factory=lambda: array("d"))
    """When tokens came: reads that held at least one chunk. Empty where only the end is seen."""
    chunks: int = 0
    tokens: int = 0


def prompt(seed: int, length: int, vocab: int) -> list[int]:
    """Token ids whose first three are the seed's digits: no other seed shares a page of the prefix cache."""
    span = vocab - SPECIAL
    digits = [seed % span, seed // span % span, seed // span**2 % span]
    return [SPECIAL + (digits[i] if i < 3 else (seed * 7919 + i * 31) % span) for i in range(length)]
