"""An event loop in a thread of its own, for calls that hold a loop for long: the engine's own has others to serve."""

import asyncio
import contextvars
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class SideLoop:
    """Runs coroutines there, from the loop of the caller. Sees the context variables of the thread that makes it."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        run = contextvars.copy_context().run
        threading.Thread(target=run, args=(self._run,), name=name, daemon=True).start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    async def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result. Cancelling this cancels it."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    def close(self) -> None:
        """Nothing is awaited any more."""
        self.loop.call_soon_threadsafe(self.loop.stop)
