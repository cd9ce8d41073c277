"""Whether sides may be compared: their greedy texts for a few fixed prompts, sent one after another.

Not under load, where the batch a request shares changes its numerics.
"""

from benchmarks.token_path.load import prompt

PROMPTS = 8
INPUT = 48
OUTPUT = 32
BROKEN = "\ufffd"
"""Stands for bytes that are no text; a stream's detokenizer keeps back what a whole text's replaces."""


def prompts(vocab: int) -> list[list[int]]:
    """Far from those of any load."""
    return [prompt(vocab // 2 + 1 + number, INPUT, vocab) for number in range(PROMPTS)]


def difference(texts: dict[str, list[str]]) -> str | None:
    """One line about the first side whose texts are not the first side's; None when all are equal."""
    first, *others = texts
    for side in others:
        for number, (one, other) in enumerate(zip(texts[first], texts[side], strict=True)):
            if (one := one.replace(BROKEN, "")) != (other := other.replace(BROKEN, "")):
                at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
                shown = f"{one[at : at + 20]!r} and {other[at : at + 20]!r}"
                return f"prompt {number}: {first} and {side} differ from character {at} on: {shown}"
    return None
