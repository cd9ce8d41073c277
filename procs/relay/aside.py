"""What may hang (a file, a driver, supervisord) is read in a thread of its own, and waited for only so long."""

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
READ_SECONDS = 0.5
"""A scrape of the node must end within 1 s, whatever hangs."""


class Aside(Generic[T]):
    """One thing to read. A reading that hangs is not begun twice; what it finds too late is thrown away.

    Daemon threads, not the loop's executor: a process must be able to end while one of them hangs.
    """

    def __init__(self, name: str, read: Callable[[], T]) -> None:
        self.name = name
        self._read = read
        self._reading: asyncio.Future[T] | None = None
        self._trouble = ""

    async def get(self, seconds: float = READ_SECONDS) -> T | None:
        """None when there is no answer in time, or an error instead of one; a change from or to that is logged."""
        if self._reading is None or self._reading.done():
            self._reading = self._begin()
        reading = self._reading
        await asyncio.wait([reading], timeout=seconds)
        if not reading.done():
            self._say(f"no answer within {seconds:.1f} s")
            return None
        if (error := reading.exception()) is not None:
            self._say(str(error) or type(error).__name__)
            return None
        self._say("")
        return reading.result()

    def _begin(self) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # it may come when nobody waits

        def done(result: T | None, error: Exception | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            found: tuple[T | None, Exception | None]
            try:
                found = self._read(), None
            except Exception as error:  # whatever a library raises costs its own part of a scrape only
                found = None, error
            try:
                loop.call_soon_threadsafe(done, *found)
            except RuntimeError:  # the process is ending
                return

        threading.Thread(target=run, name=self.name, daemon=True).start()
        return future

    def _say(self, trouble: str) -> None:
        if trouble != self._trouble:
            logging.warning("metrics of %s: %s", self.name, trouble or "they are read again")
            self._trouble = trouble
