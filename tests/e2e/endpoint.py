"""A client of one Dynamo endpoint, in a process of its own: what a worker answers to whoever calls it past the frontend.

``python -m tests.e2e.endpoint NAMESPACE.COMPONENT.ENDPOINT``: request as JSON in, one line with the list of its answers out.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests import marked
from tests.frontend import LOOPBACK


def ask(store: Path, endpoint: str, request: Any, seconds: float = 120.0) -> list[Any]:
    """Everything that one worker behind the endpoint answers. ``store``: the file discovery."""
    environment = {**os.environ, **LOOPBACK, "DYN_FILE_KV": str(store), "HOME": str(store.parent), "DYN_LOG": "warn"}
    answers: list[Any] = marked.ask("tests.e2e.endpoint", [endpoint], request, environment, seconds)
    return answers


async def main(path: str, request: Any) -> None:
    from dynamo.runtime import DistributedRuntime

    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="zmq")
    client = await runtime.endpoint(path).client()
    await client.wait_for_instances()
    answers = []
    async for item in await client.generate(request, annotated=False):
        answers.append(item.data() if hasattr(item, "data") else item)
    marked.answer(answers)
    runtime.shutdown()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], json.load(sys.stdin)))
