"""A record as a picture, tokens/s and ITL by streams: ``python -m benchmarks.token_path.plot RUN.json OUT.svg``."""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.token_path.record import label

PANELS = {"tokens_per_s": "tokens/s", "itl_p50": "ITL p50, ms", "itl_p99": "ITL p99, ms"}


def points(loads: list[dict[str, Any]], key: str) -> dict[str, list[tuple[int, float, float, float]]]:
    """By side: streams, median, lowest and highest of the closed loops that have the figure."""
    values: dict[str, dict[int, list[float]]] = {}
    for load in loads:
        if not load["rate"] and load[key] is not None:
            values.setdefault(label(load), {}).setdefault(load["streams"], []).append(load[key])
    return {
        side: [(streams, median(found), min(found), max(found)) for streams, found in sorted(by_streams.items())]
        for side, by_streams in values.items()
    }


def draw(document: dict[str, Any], target: Path) -> None:
    """The format is that of the name's ending."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(5.5 * len(PANELS), 4.5), layout="constrained")
    sides = list(dict.fromkeys(label(load) for load in document["loads"]))
    for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
        for side, found in points(document["loads"], key).items():
            streams, middle, low, high = zip(*found, strict=True)
            color = f"C{sides.index(side) % 10}"
            axis.plot(streams, middle, marker="o", markersize=3, label=side, color=color, linestyle="--" if "/" in side else "-")
            axis.fill_between(streams, low, high, alpha=0.15, linewidth=0, color=color)
        axis.set(title=title, xlabel="streams", xscale="log", yscale="linear" if key == "tokens_per_s" else "log")
        ticks = sorted({load["streams"] for load in document["loads"] if not load["rate"]})
        axis.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    hardware = ", ".join(document["host"]["gpus"]) or f"{document['host']['cores']} cores"
    figure.suptitle(
        f"{hardware}, {document['run']['input']} tokens in, {document['run']['output_tokens']} out, {document['date'][:10]}"
    )
    figure.savefig(target)


def main() -> int:
    if len(sys.argv) != 3:
        print("usage: python -m benchmarks.token_path.plot RUN.json OUT.svg", file=sys.stderr)
        return 2
    try:
        document = json.loads(Path(sys.argv[1]).read_text())
    except (OSError, ValueError) as error:
        print(f"{sys.argv[1]}: {error}", file=sys.stderr)
        return 2
    draw(document, Path(sys.argv[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
