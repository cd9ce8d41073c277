"""The seam between the engine process and what generates tokens. A faster source replaces a backend, not the process."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from shared.errors import Code
from shared.frames import EngineFacts, KvUse, Serving


class Sink(Protocol):
    """Where a backend puts what it has. Called on the event loop only, and never raises."""

    def output(
        self,
        rid: str,
        token_ids: list[int],
        finish: dict[str, Any] | None,
        meta: dict[str, Any] | None,
        text: str | None = None,
    ) -> None:
        """New tokens of a request; the list is the sink's from now on. ``finish`` ends the request."""

    def step(self, rows: Iterable[tuple[str, list[int]]]) -> None:
        """New tokens of many requests in one call: the same as ``output(rid, token_ids, None, None)`` for each row."""

    def failed(self, rid: str, code: Code, message: str) -> None:
        """The request ended without an output."""

    def kv_use(self, use: KvUse) -> None:
        """KV use of one DP rank."""

    def serving(self, serving: Serving) -> None:
        """What it serves beside its base model has changed: pauses, adapters, taints."""


class Backend(Protocol):
    """An engine that is up. Built before the loop runs (building may block for minutes)."""

    facts: EngineFacts
    info: dict[str, str]
    """What the engine's Beat says of it (Beat.info)."""

    def start(self, sink: Sink, stop: Callable[[], None]) -> None:
        """Called once in the running loop, before any submit. ``stop`` asks the process to stop cleanly."""

    async def warm(self) -> None:
        """Called once after ``start``: what has to run through the engine before it may be called ready. Raises when it fails."""

    def submit(self, rid: str, payload: dict[str, Any]) -> None:
        """Start a request. Its outputs, and exactly one end, go to the sink."""

    def abort(self, rid: str) -> None:
        """End a request soon; its end still goes to the sink. Unknown ids are ignored."""

    async def control(self, op: str, args: dict[str, Any]) -> Any:
        """Run an engine control and return plain data. Raises ValueError for an unknown one or bad arguments."""

    def numbers(self) -> dict[str, float]:
        """Numbers for the engine's Beat, a DP rank's with ``_dpN`` at the end. Called from a thread beside the loop."""

    def close(self) -> None:
        """Release what the engine holds; nothing is called afterwards."""
