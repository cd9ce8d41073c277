"""Prometheus text from several sources as one: each family's HELP and TYPE once, its samples together."""

import re
from collections.abc import Iterable, Mapping

SUFFIXES = ("_bucket", "_sum", "_count", "_total", "_created")
SAMPLE = re.compile(r"^([^\s{]+)(?:\{(.*)\})?( .*)$")
LABEL_NAME = re.compile(r"""(\w+)="(?:[^"\\]|\\.)*\"""")


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


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
