"""A real Dynamo KV router in a process of its own: asked what it believes, it sends no request anywhere.

``python -m tests.kv_router DISCOVERY_BACKEND BLOCK_SIZE``: token lists in, one JSON list a line; overlaps out.
"""

import asyncio
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from tests.frontend import LOOPBACK

SECONDS = 20.0


class KvRouter:
    """``overlaps(tokens)``: blocks of that prompt which the router takes for cached, by (worker id, DP rank)."""

    def __init__(self, store: Path, block_size: int, *, backend: str = "file", env: dict[str, str] | None = None) -> None:
        environment = {**os.environ, **LOOPBACK, "DYN_FILE_KV": str(store), "HOME": str(store.parent), "DYN_LOG": "warn"}
        self.log = store.parent / "kv-router.log"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kv_router", backend, str(block_size)],
            env=environment | (env or {}), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("wb"), text=True,
        )  # fmt: skip
        self._lines: Queue[str] = Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

    def overlaps(self, tokens: list[int]) -> dict[tuple[int, int], int]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(tokens) + "\n")
        self._process.stdin.flush()
        try:
            rows = json.loads(self._lines.get(timeout=SECONDS))
        except Empty:
            raise AssertionError(f"the router does not answer: {self.log.read_text()[-2000:]}") from None
        return {(row["worker_id"], row["dp_rank"]): row["device_blocks"] for row in rows if row["device_blocks"]}

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def __enter__(self) -> "KvRouter":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


async def _serve(backend: str, block_size: int) -> None:
    from dynamo.llm import KvRouter as Router
    from dynamo.llm import KvRouterConfig
    from dynamo.runtime import DistributedRuntime

    runtime = DistributedRuntime(asyncio.get_running_loop(), backend, "tcp", event_plane="zmq")
    made: Any = Router(runtime.endpoint("dynamo.backend.generate"), block_size, KvRouterConfig())
    while line := await asyncio.to_thread(sys.stdin.readline):
        found = await made.get_overlap_scores(json.loads(line))
        print(json.dumps(found["workers"]), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
