"""The differences that are meant: of which requests, at which place of the answer, and why."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from tests.parity.compare import Difference


@dataclass(frozen=True)
class Expected:
    """Patterns as of a shell: ``*`` is any text."""

    names: str
    """Of the requests."""
    paths: str
    """Of the differences: places in the answer."""
    reason: str

    def covers(self, name: str, difference: Difference) -> bool:
        # A path has brackets of its own, which are no sets of characters here.
        return fnmatchcase(name, self.names) and fnmatchcase(difference.path, self.paths.replace("[", "[[]"))


EXPECTED: list[Expected] = []


def reason_of(name: str, difference: Difference) -> Expected | None:
    """The first entry that expects the difference."""
    return next((entry for entry in EXPECTED if entry.covers(name, difference)), None)
