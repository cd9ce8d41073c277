"""The epoch that this node's engine was last started for, on disk: the coordinator writes it, the keeper reads it."""

from pathlib import Path

import msgspec

from shared import files
from shared.config import EPOCH_FILE


class Started(msgspec.Struct, frozen=True):
    """``group``: made at the start of the leader's node; ``epoch`` counts in it. 0: none yet, or a node without a group."""

    group: str = ""
    epoch: int = 0


def load(runtime_dir: Path) -> Started:
    """What was saved; ``Started()`` when nothing was, or it can't be read."""
    try:
        return msgspec.json.decode((runtime_dir / EPOCH_FILE).read_bytes(), type=Started)
    except (OSError, msgspec.MsgspecError):
        return Started()


def save(runtime_dir: Path, started: Started) -> None:
    """Replace it atomically. Raises OSError."""
    files.rewrite(runtime_dir / EPOCH_FILE, msgspec.json.encode(started))
