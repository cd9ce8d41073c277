"""Large bytes on the request path: parts of a message behind its frame, not inside its msgpack, which copies at each end."""

from collections.abc import Sequence
from typing import Any

from shared.frames import Output

Blob = bytes | bytearray | memoryview
BLOBS = "blobs"
"""Where a payload or an output's metadata holds them, a list."""


def take(holder: dict[str, Any] | None) -> tuple[dict[str, Any] | None, list[Blob]]:
    """A payload or metadata without its blobs, and those. The given one stays as it is."""
    if not holder or BLOBS not in holder:
        return holder, []
    return {name: value for name, value in holder.items() if name != BLOBS}, list(holder[BLOBS])


def detach(outputs: Sequence[Output]) -> list[Blob]:
    """Move the blobs of a step's outputs out of their metadata, to be sent behind the frame. ``attach`` undoes it."""
    parts: list[Blob] = []
    for output in outputs:
        if output.meta is not None and BLOBS in output.meta:
            output.meta, found = take(output.meta)
            output.blobs = len(found)
            parts += found
    return parts


def attach(outputs: Sequence[Output], parts: Sequence[Blob]) -> None:
    """The reverse of ``detach``, where a message arrives. Raises ValueError when parts are missing or left over."""
    if sum(output.blobs for output in outputs) != len(parts):
        raise ValueError(f"{len(parts)} parts behind a step that has {sum(output.blobs for output in outputs)}")
    place = 0
    for output in outputs:
        if output.blobs:
            output.meta = {**(output.meta or {}), BLOBS: list(parts[place : place + output.blobs])}
            place += output.blobs
