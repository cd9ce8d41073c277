"""The peer: ``sgl.Engine.async_generate`` in one process, nothing around it. Prints one JSON line a load.

usage: python -m benchmarks.raw_engine LOADS_JSON -- FLAGS OF python -m dynamo.sglang
"""

import asyncio
import json
import sys
import time

from benchmarks.figures import Stream, figures, prompt


async def one(engine: object, ids: list[int], new_tokens: int) -> Stream:
    began = last = time.perf_counter()
    ttft, gaps, tokens = 0.0, [], 0
    params = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    async for chunk in await engine.async_generate(input_ids=ids, sampling_params=params, stream=True):  # type: ignore[attr-defined]
        now = time.perf_counter()
        if tokens == 0:
            ttft = now - began
        else:
            gaps.append(now - last)
        last = now
        tokens = chunk["meta_info"]["completion_tokens"]
    return Stream(ttft, gaps, tokens)


async def load(engine: object, streams: int, seed: int, shape: dict[str, int]) -> dict[str, object]:
    began = time.perf_counter()
    done = await asyncio.gather(
        *(one(engine, prompt(seed + i, shape["input"], shape["vocab"]), shape["output"]) for i in range(streams))
    )
    return figures(list(done), time.perf_counter() - began).as_dict()


def main() -> None:
    import sglang as sgl
    from dynamo.sglang.args import parse_args

    spec = json.loads(sys.argv[1])
    parsed = asyncio.run(parse_args(sys.argv[3:]))
    asyncio.set_event_loop(asyncio.new_event_loop())
    engine = sgl.Engine(server_args=parsed.server_args)
    loop = asyncio.get_event_loop()
    loop.run_until_complete(load(engine, 4, 10_000, spec["shape"]))
    for streams, seed in spec["loads"]:
        print("RESULT " + json.dumps(loop.run_until_complete(load(engine, streams, seed, spec["shape"]))), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()
