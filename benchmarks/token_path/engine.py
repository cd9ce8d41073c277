"""A process that holds ``sgl.Engine`` alone and sends itself the loads: the sides of ``side.ALONE``, in one start.

usage: python -m benchmarks.token_path.engine FD -- FLAGS OF python -m dynamo.sglang
FD is an inherited multiprocessing connection. On it comes "up"; then prompts get their greedy outputs, raw and bare; then
loads are sent (drive.serve), told which side it is before.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.token_path.drive import serve
from benchmarks.token_path.load import Request
from benchmarks.token_path.side import ALONE


class Generate:
    """``async_generate``, as its user would call it (drive.Source)."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._receiver = engine.tokenizer_manager
        self._stream = True

    def use(self, way: str) -> None:
        self._receiver.bare = way != "raw"
        self._stream = way != "scheduler"

    def prepare(self, ids: list[int], output: int) -> dict[str, Any]:
        params = {"temperature": 0, "max_new_tokens": output, "ignore_eos": True}
        return {"input_ids": ids, "sampling_params": params, "stream": self._stream}

    async def run(self, prepared: dict[str, Any], request: Request) -> None:
        async for chunk in self._answers(prepared):
            if not self._receiver.bare:
                request.arrivals.append(time.monotonic())
            request.chunks += 1
            request.tokens = chunk["meta_info"]["completion_tokens"]
        request.ended = time.monotonic()

    async def outputs(self, prompts: list[list[int]], output: int) -> dict[str, list[list[int]]]:
        """Greedy output ids either way, one prompt after another."""
        found: dict[str, list[list[int]]] = {}
        self._receiver.keep = {}
        for way in ALONE:
            self.use(way)
            found[way] = [await self._output(ids, output) for ids in prompts]
        self._receiver.keep = None
        return found

    async def _output(self, ids: list[int], output: int) -> list[int]:
        out: list[int] = []
        async for chunk in self._answers(self.prepare(ids, output)):
            out += chunk["output_ids"]
        return out

    async def _answers(self, prepared: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        answer = await self._engine.async_generate(**prepared)
        if not prepared["stream"]:
            yield answer
            return
        async for chunk in answer:
            yield chunk


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    from dynamo.sglang.args import parse_args

    from benchmarks.token_path.ceiling import WithReceiver

    server_args = asyncio.run(parse_args(sys.argv[3:])).server_args
    loop = asyncio.new_event_loop()  # uvloop's: SGLang has set its policy
    asyncio.set_event_loop(loop)
    engine = WithReceiver(server_args=server_args)
    source = Generate(engine)
    connection.send("up")
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        connection.send(runner.run(source.outputs(*connection.recv())))
        serve(connection, runner, source)


if __name__ == "__main__":
    main()
