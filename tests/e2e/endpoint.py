"""A client of one Dynamo endpoint, in a process of its own: what a worker answers to whoever calls it past the frontend.

``python -m tests.e2e.endpoint NAMESPACE.COMPONENT.ENDPOINT``: request as JSON in, one line with the list of its answers out.
"""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.frontend import LOOPBACK

MARK = "ANSWERS "


def ask(store: Path, endpoint: str, request: Any, seconds: float = 120.0) -> list[Any]:
    """Everything that one worker behind the endpoint answers. ``store``: the file discovery."""
    environment = {**os.environ, **LOOPBACK, "DYN_FILE_KV": str(store), "HOME": str(store.parent), "DYN_LOG": "warn"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.endpoint", endpoint],
        input=json.dumps(request),
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert lines, done.stderr[-3000:]
    answers: list[Any] = json.loads(lines[0][len(MARK) :])
    return answers


async def main(path: str, request: Any) -> None:
    from dynamo.runtime import DistributedRuntime

    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="zmq")
    client = await runtime.endpoint(path).client()
    await client.wait_for_instances()
    answers = []
    async for item in await client.generate(request, annotated=False):
        answers.append(item.data() if hasattr(item, "data") else item)
    print(MARK + json.dumps(answers), flush=True)
    runtime.shutdown()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], json.load(sys.stdin)))
