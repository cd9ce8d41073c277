"""What relays have in a file store of Dynamo 1.6.1 about KV events: a source and a channel for each publisher."""

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

SOURCES, CHANNELS = "event_sources", "event_channels"

Key = tuple[int, int]
"""Worker id, DP rank."""


class Records:
    """``store``: DYN_FILE_KV; ``endpoint``: NAMESPACE.COMPONENT.ENDPOINT that the events belong to."""

    def __init__(self, store: Path, endpoint: str) -> None:
        self._root = store / "v1"
        namespace, component, name = endpoint.removeprefix("dyn://").split(".")
        self._scope = f"namespace/{namespace}/component/{component}/endpoint/{name}/"

    def remove(self, keys: set[Key]) -> int:
        """Remove the sources of these and their channels; how many sources there were. Raises OSError."""
        found = [path for path, key in self._sources() if key in keys]
        for path in found:
            (self._root / CHANNELS / path.name).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        return len(found)

    def missing(self, keys: set[Key]) -> bool:
        """One of these has no source."""
        return bool(keys) and not keys <= {key for _, key in self._sources()}

    def _sources(self) -> Iterator[tuple[Path, Key]]:
        for path in (self._root / SOURCES).glob("*"):
            if not unquote(path.name).startswith(self._scope):
                continue
            try:
                worker = json.loads(path.read_bytes())["metadata"]["worker"]
                yield path, (int(worker["worker_id"]), int(worker["dp_rank"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # gone meanwhile, or another kind of source
