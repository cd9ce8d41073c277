"""The relay's own Dynamo runtime, made only when there are KV events to publish, and what it has in discovery."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from procs.relay.kv.outlet import Publisher
from procs.relay.kv.records import Key, Records
from shared.config import NodeConfig
from shared.registrations import Registration, hold

SIGN = "sgnode_relay"
"""An endpoint that nobody calls. Its end is the only sign of its runtime's end in Dynamo 1.6.1: then nothing is published."""


class Cluster:
    """One DistributedRuntime."""

    def __init__(self, config: NodeConfig, runtime: Any) -> None:
        dynamo = config.dynamo
        self._dynamo = dynamo
        self._runtime = runtime
        path = f"{dynamo.namespace}.{dynamo.component}.{dynamo.endpoint}"
        self._endpoint = runtime.endpoint(path)
        store = os.environ.get("DYN_FILE_KV", "") if dynamo.discovery_backend == "file" else ""
        self._records = Records(Path(store), dynamo.kv_state_endpoint or path) if store else None
        # With etcd this is its lease: the coordinator revokes it when this process is dead.
        registration = Registration("relay", self._endpoint.connection_id(), dynamo.discovery_backend, store)
        self._held = hold(config.path, registration)
        sign = runtime.endpoint(f"{dynamo.namespace}.{dynamo.component}.{SIGN}")
        self._serving = asyncio.ensure_future(sign.serve_endpoint(_nothing, graceful_shutdown=False))
        self._serving.add_done_callback(lambda done: done.cancelled() or done.exception())

    @classmethod
    async def open(cls, config: NodeConfig) -> "Cluster":
        """Raises what Dynamo raises when discovery isn't reached; that takes its time, so it is not done on the loop."""
        from dynamo.runtime import DistributedRuntime

        dynamo, loop = config.dynamo, asyncio.get_running_loop()
        planes = {"event_plane": dynamo.event_plane, "response_plane": dynamo.response_plane}
        runtime = await asyncio.to_thread(DistributedRuntime, loop, dynamo.discovery_backend, dynamo.request_plane, **planes)
        return cls(config, runtime)

    @property
    def ended(self) -> bool:
        """Nothing is published any more: its etcd lease is lost."""
        return bool(self._serving.done())

    def publisher(self, worker: int, rank: int, block_size: int) -> Publisher:
        """With the arguments of dynamo.sglang 1.6.1 (publisher.py, init_kv_event_publish), but for the ZMQ endpoint."""
        from dynamo.llm import KvEventPublisher

        made: Publisher = KvEventPublisher(
            self._endpoint,
            worker_id=worker,
            kv_block_size=block_size,
            dp_rank=rank,
            enable_local_indexer=self._dynamo.enable_local_indexer,
            kv_state_endpoint=self._dynamo.kv_state_endpoint,
        )
        return made

    def clear(self, keys: set[Key]) -> int:
        """Remove what a killed relay left for these in a file store; how many there were.

        Two sources of one rank are ambiguous: a router takes neither until the old one's TTL ends (10 s).
        """
        return self._records.remove(keys) if self._records is not None else 0

    def missing(self, keys: set[Key]) -> bool:
        """Records of these are gone: others took this process for dead. Dynamo never writes them again."""
        return self._records is not None and self._records.missing(keys)

    def close(self) -> None:
        self._runtime.shutdown()
        os.close(self._held)


async def _nothing(request: Any, context: Any) -> AsyncIterator[dict[str, Any]]:
    yield {}
