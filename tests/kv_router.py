"""A real Dynamo KV router in a process of its own: asked what it believes, it sends no request anywhere.

``python -m tests.kv_router DISCOVERY_BACKEND BLOCK_SIZE [EVENTS MODEL_DIR]``: a line in, one out. A JSON list of tokens is
answered with their overlaps, ``null`` with all that the router believes. With EVENTS, a ZMQ address of SGLang's, it is also the
worker whose events those are, and publishes them as dynamo.sglang 1.6.1 does.
"""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from tests.frontend import LOOPBACK

SECONDS = 20.0


class KvRouter:
    """``overlaps(tokens)``: blocks of that prompt which the router takes for cached, by (worker id, DP rank).

    ``incumbent``: (address of SGLang's events, model's directory); that worker's id is whatever ``believed`` has.
    """

    def __init__(
        self, store: Path, block_size: int, *,
        backend: str = "file", env: dict[str, str] | None = None, incumbent: tuple[str, Path] | None = None,
    ) -> None:  # fmt: skip
        environment = {**os.environ, **LOOPBACK, "DYN_FILE_KV": str(store), "HOME": str(store.parent), "DYN_LOG": "warn"}
        self.log = store.parent / f"kv-router-{store.name}.log"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kv_router", backend, str(block_size), *map(str, incumbent or ())],
            env=environment | (env or {}), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("wb"), text=True,
        )  # fmt: skip
        self._lines: Queue[str] = Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

    def _ask(self, what: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        try:
            return json.loads(self._lines.get(timeout=SECONDS))
        except Empty:
            raise AssertionError(f"the router does not answer: {self.log.read_text()[-2000:]}") from None

    def overlaps(self, tokens: list[int]) -> dict[tuple[int, int], int]:
        rows = self._ask(tokens)
        return {(row["worker_id"], row["dp_rank"]): row["device_blocks"] for row in rows if row["device_blocks"]}

    def believed(self) -> dict[int, dict[int, int]]:
        """By worker id: each block's hash, which is SGLang's, and Dynamo's own hash of the block's tokens. All ranks together."""
        found: dict[int, dict[int, int]] = {}
        for row in self._ask(None):
            blocks = found.setdefault(row["worker_id"], {})
            for block in row["event"]["data"]["stored"]["blocks"]:
                blocks[block["block_hash"]] = block["tokens_hash"]
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def __enter__(self) -> "KvRouter":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


async def _serve(backend: str, block_size: int, *incumbent: str) -> None:
    from dynamo.llm import KvRouter as Router
    from dynamo.llm import KvRouterConfig
    from dynamo.runtime import DistributedRuntime

    runtime = DistributedRuntime(asyncio.get_running_loop(), backend, "tcp", event_plane="zmq")
    endpoint = runtime.endpoint("dynamo.backend.generate")
    kept = await _publish(endpoint, block_size, *incumbent) if incumbent else None
    made: Any = Router(endpoint, block_size, KvRouterConfig())
    while line := await asyncio.to_thread(sys.stdin.readline):
        tokens = json.loads(line)
        if tokens is None:
            print(json.dumps(json.loads(await made.dump_events())), flush=True)
        else:
            print(json.dumps((await made.get_overlap_scores(tokens))["workers"]), flush=True)
    del kept


async def _publish(endpoint: Any, block_size: int, events: str, model: str) -> list[Any]:
    """A worker's identity, and its publisher with the arguments of dynamo.sglang 1.6.1 (publisher.py, init_kv_event_publish)."""
    from dynamo.llm import KvEventPublisher, ModelInput, ModelRuntimeConfig, ModelType, WorkerType, register_model

    async def handler(request: Any, context: Any) -> AsyncIterator[dict[str, Any]]:
        yield {"token_ids": [], "finish_reason": "stop"}

    serving = asyncio.ensure_future(endpoint.serve_endpoint(handler))
    config = ModelRuntimeConfig()
    config.kv_event_publishing_enabled = config.enable_local_indexer = True
    await register_model(
        ModelInput.Tokens, ModelType.Completions, endpoint, model, "incumbent", kv_cache_block_size=block_size,
        runtime_config=config, worker_type=WorkerType.Aggregated,
    )  # fmt: skip
    publisher = KvEventPublisher(
        endpoint=endpoint, worker_id=None, kv_block_size=block_size, zmq_endpoint=events, zmq_topic="",
        enable_local_indexer=True, dp_rank=0,
    )  # fmt: skip
    return [serving, publisher]


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))
