"""Each node beside each peer of the same pass over the sides: ratios and differences that a drifting host leaves alone."""

from collections.abc import Callable
from typing import Any

from benchmarks.token_path import table
from benchmarks.token_path.record import groups

COMPARED: dict[str, tuple[str, Callable[[float, float], float]]] = {
    "tokens_per_s": ("tok/s of it to", lambda ours, theirs: ours / theirs),
    "ttft_p50": ("TTFT p50, ms more than", lambda ours, theirs: ours - theirs),
    "itl_p50": ("ITL p50, ms more than", lambda ours, theirs: ours - theirs),
}
"""What is said of two loads, and how it is got."""


def pairs(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> list[float]:
    """One value for each load of ours that has its like in the same pass; none without passes (``--at-once``)."""
    by_turn = {(load["pass"], load["repeat"]): load[key] for load in theirs if "pass" in load}
    found = [(load[key], by_turn.get((load.get("pass"), load["repeat"]))) for load in ours]
    return [COMPARED[key][1](one, other) for one, other in found if one is not None and other is not None]


def render(loads: list[dict[str, Any]]) -> str:
    """A table for each load and figure: median, ``[lowest, highest]`` over the passes. Empty without passes."""
    texts = []
    for kind, sides in groups(loads):
        nodes = [(side, same) for side, same in sides if same[0]["agents"]]
        peers = [(side, same) for side, same in sides if not same[0]["agents"]]
        for key, (title, _) in COMPARED.items():
            compared = [[table.cell(pairs(ours, theirs, key), ranged=True) for _, theirs in peers] for _, ours in nodes]
            if any(cell != table.NOTHING for row in compared for cell in row):
                rows = [[side, *cells] for (side, _), cells in zip(nodes, compared, strict=True)]
                texts.append(table.aligned([[f"{kind}, {title}", *(side for side, _ in peers)], *rows]))
    return "\n\n".join(texts)
