"""One stream over HTTP from an OpenAI ``/v1/completions``, read as bytes: a client that is never the limit."""

import json
import re
import socket
import time
from typing import Any

import aiohttp

from benchmarks.token_path.load import Request

EVENT = b"data: {"
"""Begins every event of a stream but the last, ``[DONE]``."""
USAGE = b'"usage":{'
TOKENS = re.compile(rb'"completion_tokens":(\d+)')
TAIL = 2000
"""Bytes of a stream's end that are kept: its usage, or what went wrong."""


class Http:
    """Requests to one frontend over connections that are kept from load to load (drive.Source)."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str) -> None:
        self._session, self._url, self._model = session, f"{url}/v1/completions", model

    def use(self, way: str) -> None:
        """There is one."""

    def prepare(self, ids: list[int], output: int) -> bytes:
        body: dict[str, Any] = {"model": self._model, "prompt": ids, "max_tokens": output, "temperature": 0, "ignore_eos": True}
        return json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()

    async def run(self, prepared: bytes, request: Request) -> None:
        """Raises RuntimeError when the answer is an error or has no usage."""
        headers = {"Content-Type": "application/json"}
        carry = tail = b""
        arrivals = request.arrivals
        async with self._session.post(self._url, data=prepared, headers=headers) as reply:
            if reply.status != 200:
                raise RuntimeError(f"status {reply.status}: {(await reply.text())[:300]}")
            _acknowledge(reply)
            while data := await reply.content.readany():
                now = time.monotonic()
                # An event may begin in one read and go on in the next.
                chunks = (carry + data).count(EVENT)
                carry = data[1 - len(EVENT) :]
                tail = data if len(data) > TAIL else (tail + data)[-TAIL:]
                if USAGE in data:
                    chunks -= 1  # an event of its own, without tokens
                if chunks > 0:
                    arrivals.append(now)
                    request.chunks += chunks
        request.ended = time.monotonic()
        if not (found := TOKENS.search(tail)):
            raise RuntimeError(f"the stream ended without its usage: {tail[-300:]!r}")
        request.tokens = int(found[1])


def _acknowledge(reply: aiohttp.ClientResponse) -> None:
    """Acknowledge the headers now: else the first chunk waits up to 40 ms (Nagle there, a delayed ACK here)."""
    connection = reply.connection
    raw = connection.transport.get_extra_info("socket") if connection and connection.transport else None
    if raw is not None:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
