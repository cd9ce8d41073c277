"""The run as JSON: what was asked for, where, each load's figures. Written again after every load."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.token_path import host


class Record:
    """``document`` is what is written; ``path`` None writes nothing."""

    def __init__(self, path: Path | None, run: dict[str, Any]) -> None:
        self._path = path
        self.document: dict[str, Any] = {
            **host.header("benchmarks.token_path"),
            "run": run,
            "starts": [],
            "loads": [],
            "texts": {},
            "refused": None,
            "failures": [],
        }

    @property
    def loads(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.document["loads"]
        return found

    def add(self, kind: str, entry: dict[str, Any]) -> None:
        """To ``starts``, ``loads`` or ``failures``."""
        self.document[kind].append(entry)
        self.save()

    def save(self) -> None:
        """Replaced atomically: a run that is cut keeps what it has."""
        if self._path is not None:
            temporary = self._path.with_name(self._path.name + ".tmp")
            temporary.write_text(json.dumps(self.document, indent=1) + "\n")
            temporary.replace(self._path)


def label(load: dict[str, Any]) -> str:
    """A side as tables and plots name it: ``sgnode/20 x4`` is with --stream-interval 20 and four agents."""
    return str(load["side"]) + (f" x{load['agents']}" if load["agents"] else "")


def groups(loads: list[dict[str, Any]]) -> Iterator[tuple[str, list[tuple[str, list[dict[str, Any]]]]]]:
    """Loads by what was sent, then by who got it, each in the order in which they first came."""
    kinds: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for load in loads:
        kinds.setdefault(load["load"], {}).setdefault(label(load), []).append(load)
    for kind, sides in kinds.items():
        yield kind, list(sides.items())
