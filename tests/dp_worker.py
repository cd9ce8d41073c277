"""A Dynamo worker with two DP ranks that answers nobody: the leader's identity, where SGLang can't have one on a CPU.

``python -m tests.dp_worker MODEL_DIR NAME BLOCK_SIZE`` prints its worker id and stays.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any


async def main(path: str, name: str, block_size: int) -> None:
    from dynamo.llm import ModelInput, ModelRuntimeConfig, ModelType, WorkerType, register_model
    from dynamo.runtime import DistributedRuntime

    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="zmq")
    endpoint = runtime.endpoint("dynamo.backend.generate")

    async def handler(request: Any, context: Any) -> AsyncIterator[dict[str, Any]]:
        yield {"token_ids": [], "finish_reason": "stop"}

    serving = asyncio.ensure_future(endpoint.serve_endpoint(handler))
    config = ModelRuntimeConfig()
    config.data_parallel_size = 2
    config.kv_event_publishing_enabled = True
    await register_model(
        ModelInput.Tokens, ModelType.Completions, endpoint, path, name, kv_cache_block_size=block_size,
        runtime_config=config, worker_type=WorkerType.Aggregated,
    )  # fmt: skip
    print(endpoint.connection_id(), flush=True)
    await serving


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
