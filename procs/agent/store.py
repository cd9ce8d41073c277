"""An agent's records in a file store. Dynamo 1.6.1 never writes again what was expired there, and says no word of it.

Whoever can't touch its files is taken for dead after 10 s by any other process that uses the store.
"""

import os
from pathlib import Path

INSTANCES, CARDS = "instances", "mdc"


class FileStore:
    """``root``: DYN_FILE_KV."""

    def __init__(self, root: Path, worker_id: int) -> None:
        self._root = root
        self._end = f"%2Fgenerate%2F{worker_id:x}"

    def has(self, kind: str) -> bool:
        """The worker's record of that kind (INSTANCES or CARDS) is there."""
        return any((self._root / "v1" / kind).glob(f"*{self._end}"))

    def trouble(self) -> str:
        """Why records can't be kept alive, in an operator's words; empty when they can."""
        directory = self._root / "v1" / INSTANCES
        return f"the file store can't be written: {directory}" if not os.access(directory, os.W_OK | os.X_OK) else ""
