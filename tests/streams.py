"""Streams as clients see them: many at once through a frontend, each with its tokens, its end and when."""

import asyncio
import json
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.harness import wait_for

FOREVER = 900_000
"""Tokens of a stream that never ends by itself: the synthetic engine's context has a million."""


@dataclass
class Result:
    """One stream. ``tokens`` as its usage says at the end, else chunks so far; times are monotonic seconds."""

    status: int = 0
    tokens: int = 0
    chunks: int = 0
    finish: str = ""
    error: str = ""
    started: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    text: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return self.status == 200 and self.finish == "length" and not self.error


async def _one(session: aiohttp.ClientSession, url: str, body: dict[str, Any], result: Result) -> None:
    result.started = time.monotonic()
    try:
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            result.status = answer.status
            if answer.status != 200:
                result.error = (await answer.text())[:300]
                return
            event = ""
            async for raw in answer.content:
                line = raw.decode(errors="replace").rstrip("\n")
                if line.startswith("event: "):
                    event = line[7:]
                elif event == "error" and line.startswith((": ", "data: ")):
                    result.error = line[:300]
                elif line.startswith("data: {"):
                    _chunk(json.loads(line[6:]), result)
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        result.error = f"{type(error).__name__}: {error}"
    finally:
        result.ended = time.monotonic()


def _chunk(chunk: dict[str, Any], result: Result) -> None:
    if "error" in chunk:
        result.error = json.dumps(chunk)[:300]
    for choice in chunk.get("choices") or []:
        if choice.get("text"):
            result.first = result.first or time.monotonic()
            result.chunks += 1
            result.text.append(choice["text"])
        result.finish = choice.get("finish_reason") or result.finish
    if chunk.get("usage"):
        result.tokens = chunk["usage"]["completion_tokens"]


class Streams:
    """Streams that run in a thread of their own while the test injects faults."""

    def __init__(self, seconds: float = 240.0) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._seconds = seconds
        self._session: aiohttp.ClientSession | None = None
        self._tasks: list[Any] = []
        self.results: list[Result] = []

    def _run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    async def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=self._seconds)
            self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 20)
        return self._session

    def start(self, url: str, model: str, count: int, tokens: int, **more: Any) -> list[Result]:
        """Start ``count`` streams of ``tokens`` tokens; their results fill as they go."""
        made = [Result() for _ in range(count)]
        self.results += made

        async def go(result: Result, seed: int) -> None:
            prompt = [20 + seed % 200, 30, 40]
            options = {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
            body = {"model": model, "prompt": prompt, "max_tokens": tokens, **options, **more}
            await _one(await self._open(), url, body, result)

        self._tasks += [self._run(go(result, seed)) for seed, result in enumerate(made)]
        return made

    def flowing(self, results: list[Result], seconds: float = 30.0) -> None:
        """Wait until each has had a token."""
        wait_for("a token on every stream", lambda: all(r.first or r.ended for r in results), seconds)
        bad = [r for r in results if not r.first]
        assert not bad, f"{len(bad)} streams ended without a token: {bad[0]}"

    def join(self, seconds: float = 240.0) -> list[Result]:
        """Wait for the end of all that were started."""
        deadline = time.monotonic() + seconds
        for task in self._tasks:
            task.result(max(0.1, deadline - time.monotonic()))
        return self.results

    def close(self) -> None:
        async def end() -> None:
            if self._session is not None:
                await self._session.close()

        for task in self._tasks:
            task.cancel()
        self._run(end()).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def __enter__(self) -> "Streams":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
