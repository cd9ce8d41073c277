"""A client of one Dynamo endpoint, in a process of its own: what a worker answers to whoever calls it past the frontend.

``python -m tests.e2e.endpoint NAMESPACE.COMPONENT.ENDPOINT``: a list of requests as JSON in, one line with all answers out.
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
    (answers,) = each(store, endpoint, [request], seconds)
    assert isinstance(answers, list), answers
    return answers


def each(store: Path, endpoint: str, requests: list[Any], seconds: float = 120.0) -> list[list[Any] | str]:
    """The same for requests one after the other; of one that fails its error's words."""
    environment = {**os.environ, **LOOPBACK, "DYN_FILE_KV": str(store), "HOME": str(store.parent), "DYN_LOG": "warn"}
    answers: list[list[Any] | str] = marked.ask("tests.e2e.endpoint", [endpoint], requests, environment, seconds)
    return answers


async def main(path: str, requests: list[Any]) -> None:
    from dynamo.runtime import DistributedRuntime

    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="zmq")
    client = await runtime.endpoint(path).client()
    await client.wait_for_instances()
    found: list[list[Any] | str] = []
    for request in requests:
        try:
            answer = [item async for item in await client.generate(request, annotated=False)]
            found.append([item.data() if hasattr(item, "data") else item for item in answer])
        except Exception as error:  # Dynamo's kinds are many
            found.append(f"{type(error).__name__}: {error}")
    marked.answer(found)
    runtime.shutdown()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], json.load(sys.stdin)))
