"""An agent's records in a file store. Dynamo 1.6.1 never writes again what was expired there, and says no word of it.

Whoever can't touch its files is taken for dead after 10 s by any other process that uses the store.
"""

import os
from pathlib import Path
from urllib.parse import unquote

INSTANCES, CARDS = "instances", "mdc"


class FileStore:
    """``root``: DYN_FILE_KV; ``endpoint``: the one that requests come to."""

    def __init__(self, root: Path, endpoint: str, worker_id: int) -> None:
        self._root = root
        self._end = f"/{endpoint}/{worker_id:x}"

    def has(self, kind: str) -> bool:
        """The worker's record of that kind (INSTANCES or CARDS) is there."""
        return any(unquote(path.name).endswith(self._end) for path in (self._root / "v1" / kind).glob("*"))

    def trouble(self) -> str:
        """Why records can't be kept alive, in an operator's words; empty when they can."""
        directory = self._root / "v1" / INSTANCES
        while not directory.exists():  # made by the first registration
            directory = directory.parent
        return f"the file store can't be written: {directory}" if not os.access(directory, os.W_OK | os.X_OK) else ""
