"""Prometheus text from several sources as one: each family's HELP and TYPE once, its samples together."""

import re
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric

SUFFIXES = ("_bucket", "_sum", "_count", "_total", "_created")
SAMPLE = re.compile(r"^([^\s{]+)(?:\{(.*)\})?( .*)$")
KNOWN_SERIES = 50_000
"""Labelled series that are remembered; some 10 MB."""
LABEL_NAME = re.compile(r"""(\w+)="(?:[^"\\]|\\.)*\"""")


class _Ready:
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def expose(families: Iterable[Metric]) -> str:
    """Prometheus text of families that are filled already."""
    registry = CollectorRegistry()
    registry.register(_Ready(families))
    return str(generate_latest(registry), "utf-8")


def merge(texts: Iterable[str]) -> str:
    """Join expositions. A family that several have keeps the first one's HELP and TYPE."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    for source in texts:
        current = ""
        for line in source.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                name = line.split(" ", 3)[2]
                heads, samples = families.setdefault(name, ([], []))
                if not samples and not any(head.startswith(line[:7]) for head in heads):
                    heads.append(line)
                current = name
            elif line and not line.startswith("#"):
                name = line.partition("{")[0].split(" ", 1)[0]
                if not (current and (name == current or (name.startswith(current) and name[len(current) :] in SUFFIXES))):
                    current = name
                families.setdefault(current, ([], []))[1].append(line)
    lines = [line for heads, samples in families.values() if samples for line in (*heads, *samples)]
    return "\n".join(lines) + "\n" if lines else ""


def labelled(line: str, labels: Mapping[str, str]) -> str:
    """A sample with the labels added that it doesn't have: those of the source win (dynamo.common.utils.prometheus)."""
    match = SAMPLE.match(line)
    if match is None:
        return line
    name, own, rest = match.groups()
    there = set(LABEL_NAME.findall(own or ""))
    more = ",".join(f'{key}="{_escape(value)}"' for key, value in labels.items() if key not in there)
    joined = ",".join(part for part in ((own or "").rstrip(","), more) if part)
    return f"{name}{{{joined}}}{rest}"


class Labels:
    """Adds the same labels to many samples, again and again: of a line only the value changes from scrape to scrape."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.labels = dict(labels)
        self._known: dict[str, str] = {}

    def add(self, line: str) -> str:
        """As ``labelled``."""
        end = line.rfind("}") + 1 or line.find(" ")
        if end < 1:
            return line
        series, rest = line[:end], line[end:]
        made = self._known.get(series)
        if made is None:
            if len(self._known) >= KNOWN_SERIES:
                self._known.clear()
            made = self._known[series] = labelled(f"{series} ", self.labels)[:-1]
        return made + rest


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
