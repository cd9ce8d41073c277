"""A process that holds ``sgl.Engine`` alone and sends itself the load: the sides ``raw`` and ``ceiling``.

usage: python -m benchmarks.token_path.engine raw|ceiling FD -- FLAGS OF python -m dynamo.sglang
FD is an inherited multiprocessing connection: "up" comes when the engine is, greedy outputs for a list of prompts, then loads.
"""

import asyncio
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.token_path.drive import serve
from benchmarks.token_path.load import Request


class Generate:
    """``async_generate``, as its user would call it (drive.Source)."""

    def __init__(self, engine: Any, *, arrivals: bool) -> None:
        self._engine, self._arrivals = engine, arrivals

    def prepare(self, ids: list[int], output: int) -> dict[str, Any]:
        params = {"temperature": 0, "max_new_tokens": output, "ignore_eos": True}
        return {"input_ids": ids, "sampling_params": params, "stream": True}

    async def run(self, prepared: dict[str, Any], request: Request) -> None:
        async for chunk in await self._engine.async_generate(**prepared):
            if self._arrivals:
                request.arrivals.append(time.monotonic())
            request.chunks += 1
            request.tokens = chunk["meta_info"]["completion_tokens"]
        request.ended = time.monotonic()

    async def outputs(self, prompts: list[list[int]], output: int) -> list[list[int]]:
        """Greedy output ids, one prompt after another."""
        found = []
        for ids in prompts:
            out: list[int] = []
            async for chunk in await self._engine.async_generate(**self.prepare(ids, output)):
                out += chunk["output_ids"]
            found.append(out)
        return found


def main() -> None:
    side, connection = sys.argv[1], Connection(int(sys.argv[2]))
    from dynamo.sglang.args import parse_args

    server_args = asyncio.run(parse_args(sys.argv[4:])).server_args
    loop = asyncio.new_event_loop()  # uvloop's: SGLang has set its policy
    asyncio.set_event_loop(loop)
    if side == "ceiling":
        from benchmarks.token_path.ceiling import CeilingEngine

        engine = CeilingEngine(server_args=server_args)
    else:
        import sglang as sgl

        engine = sgl.Engine(server_args=server_args)
    source = Generate(engine, arrivals=side == "raw")
    connection.send("up")
    prompts, output = connection.recv()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        manager = engine.tokenizer_manager
        manager.keep = {}
        connection.send(runner.run(source.outputs(prompts, output)))
        manager.keep = None
        serve(connection, runner, source)


if __name__ == "__main__":
    main()
