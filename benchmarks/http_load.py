"""Streams over HTTP to an OpenAI ``/v1/completions``: the node's side of a comparison."""

import asyncio
import json
import time

import aiohttp

from benchmarks.figures import Figures, Stream, figures, prompt


async def one(session: aiohttp.ClientSession, url: str, model: str, ids: list[int], new_tokens: int) -> Stream:
    """One stream; raises when it ends without its usage or with an error."""
    body = {
        "model": model,
        "prompt": ids,
        "max_tokens": new_tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    began = last = time.perf_counter()
    ttft, gaps, tokens = 0.0, [], 0
    async with session.post(f"{url}/v1/completions", json=body) as reply:
        if reply.status != 200:
            raise RuntimeError(f"{reply.status}: {(await reply.text())[:300]}")
        async for line in reply.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            now = time.perf_counter()
            chunk = json.loads(line[6:])
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
            if not chunk.get("choices"):
                continue
            if ttft == 0.0:
                ttft = now - began
            else:
                gaps.append(now - last)
            last = now
    if tokens != new_tokens:
        raise RuntimeError(f"{tokens} tokens instead of {new_tokens}")
    return Stream(ttft, gaps, tokens)


async def _load(url: str, model: str, streams: int, seed: int, shape: dict[str, int]) -> Figures:
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        began = time.perf_counter()
        done = await asyncio.gather(
            *(one(session, url, model, prompt(seed + i, shape["input"], shape["vocab"]), shape["output"]) for i in range(streams))
        )
        return figures(list(done), time.perf_counter() - began)


def load(url: str, model: str, streams: int, seed: int, shape: dict[str, int]) -> Figures:
    """Run ``streams`` at once and wait for all of them."""
    return asyncio.run(_load(url, model, streams, seed, shape))
