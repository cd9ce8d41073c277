"""A finding: how bad, what was looked at, what was found, what to do; the table, and the exit code."""

import enum
from collections.abc import Sequence

import msgspec


class Level(enum.StrEnum):
    OK = "ok"
    WARNING = "warning"
    """It works, or may; it will cost something."""
    ERROR = "error"
    """The node doesn't start, or doesn't serve, or soon won't."""


class Finding(msgspec.Struct, frozen=True):
    """One line. ``todo`` is empty when there is nothing to do."""

    level: Level
    check: str
    found: str
    todo: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(Level.OK, check, found)


def warning(check: str, found: str, todo: str) -> Finding:
    return Finding(Level.WARNING, check, found, todo)


def error(check: str, found: str, todo: str) -> Finding:
    return Finding(Level.ERROR, check, found, todo)


SOUND, WRONG = 0, 4
"""Exit codes, in line with `sgnode status`. A warning is no reason not to start."""
WIDEST = 80
"""Of FOUND: a longer one shifts its own line only."""


def exit_code(findings: Sequence[Finding]) -> int:
    return WRONG if any(each.level is Level.ERROR for each in findings) else SOUND


def summary(findings: Sequence[Finding]) -> str:
    counts = [(sum(each.level is level for each in findings), level) for level in (Level.ERROR, Level.WARNING)]
    said = [f"{count} {level}{'' if count == 1 else 's'}" for count, level in counts if count]
    return ", ".join(said) or "nothing wrong"


def render(findings: Sequence[Finding]) -> str:
    """The table, one line a finding, and the summary."""
    rows = [("LEVEL", "CHECK", "FOUND", "DO")] + [(each.level.value, each.check, each.found, each.todo) for each in findings]
    widths = [max(len(row[i]) for row in rows if len(row[i]) <= WIDEST) for i in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", summary(findings)])
