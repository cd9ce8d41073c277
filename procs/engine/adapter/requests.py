"""The life of requests that are tasks on the engine's loop: begun, cancelled, and each with exactly one end in the sink."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from procs.engine.backend import Sink
from shared.errors import Code, RequestError

ABORTED = {"type": "abort", "message": "Aborted"}
"""The finish reason of a request that was cancelled here, before or without SGLang's own word on it."""


class Requests:
    """Tasks by request id."""

    def __init__(self) -> None:
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def begin(self, rid: str, request: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(request)
        self.tasks[rid] = task
        task.add_done_callback(lambda _: self.tasks.pop(rid, None))

    def soon(self, rid: str, abort: Callable[[str], None]) -> None:
        """In the loop's next turn: a task that was cancelled before it has begun would end without a word."""
        if rid in self.tasks:
            asyncio.get_running_loop().call_soon(abort, rid)

    def __contains__(self, rid: str) -> bool:
        return rid in self.tasks

    def cancel(self, rid: str) -> None:
        """``one_end`` tells this from the process's own end."""
        if (task := self.tasks.get(rid)) is not None:
            task.cancel(ABORTED["message"])


@contextmanager
def one_end(rid: str, sink: Sink, refused: Callable[[Exception], str | None] = lambda error: None) -> Iterator[None]:
    """What a request raises becomes its end. ``refused``: why the request itself is wrong, None when it isn't."""
    try:
        yield
    except RequestError as error:
        sink.failed(rid, error.code, error.message)
    except asyncio.CancelledError as error:
        if error.args != (ABORTED["message"],):
            sink.failed(rid, Code.ENGINE_DEAD, "the engine is stopping")
            raise
        sink.output(rid, [], dict(ABORTED), None)
    except Exception as error:
        if (reason := refused(error)) is not None:
            sink.failed(rid, Code.INVALID, reason)
            return
        logging.exception("request %s", rid)
        sink.failed(rid, Code.INTERNAL, f"{type(error).__name__}: {error}")
