"""Prometheus text from several sources as one: each family's HELP and TYPE once, its samples together."""

from collections.abc import Iterable

SUFFIXES = ("_bucket", "_sum", "_count", "_total", "_created")


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
