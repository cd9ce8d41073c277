"""A process with a NIXL agent of ours, told what to do: it lets others read its memory, or reads theirs.

``Peer`` is a test's end, ``python -m tests.nixl_peer`` the process: lines of JSON, [name, arguments] and an answer.
"""

import asyncio
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

ADAPTER = "procs.engine.adapter"


class Peer:
    """Context manager. ``transport``: UCX_TLS, None for what UCX takes by itself."""

    def __init__(self, transport: str | None = None) -> None:
        env = {**os.environ, "NIXL_LOG_LEVEL": "FATAL", "UCX_LOG_LEVEL": "fatal"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.nixl_peer"],
            env=env if transport is None else {**env, "UCX_TLS": transport},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def __call__(self, name: str, *arguments: Any) -> Any:
        """A command of ``Process``, and its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the peer ended with {self.process.wait(10)}"
        return json.loads(line)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


class Process:
    """The other end. Each method is a command."""

    def __init__(self, nixl: Any) -> None:
        self._nixl = nixl
        self._agent = nixl.agent(256 << 20)
        self._shared: list[Any] = []
        self._reading: asyncio.Future[Any]

    async def share(self, size: int, value: int) -> Any:
        """So many bytes of that value; [which it is, metadata for a reader], or the code and the words of an error."""
        import torch

        from shared.errors import RequestError

        try:
            shared = await self._agent.share(torch.full((size,), value, dtype=torch.uint8))
        except RequestError as error:
            return [error.code, error.message]
        self._shared.append(shared)
        return [len(self._shared) - 1, shared.metadata.model_dump()]

    async def fetched(self, which: int) -> Any:
        await asyncio.wait_for(self._shared[which].fetched(), 10)
        return True

    async def withdraw(self, which: int) -> Any:
        shared, self._shared[which] = self._shared[which], None
        shared.withdraw()
        return True

    async def read(self, metadata: dict[str, Any], size: int, seconds: float) -> Any:
        """The values that are there, or the code and the words of an error."""
        import torch

        from shared.errors import RequestError

        try:
            found = await self._agent.read(metadata, [size], torch.uint8, seconds)
        except RequestError as error:
            return [error.code, error.message]
        return found.unique().tolist()

    async def begin(self, metadata: dict[str, Any], size: int, seconds: float) -> Any:
        """A read that goes on when this is answered."""
        before = self._nixl.numbers()
        self._reading = asyncio.ensure_future(self.read(metadata, size, seconds))
        return await self._other("nixl_registered", before)

    async def end(self) -> Any:
        """What ``read`` says of it."""
        return await self._reading

    async def cancel(self) -> Any:
        """It is given up."""
        before = self._nixl.numbers()
        self._reading.cancel()
        return await self._other("nixl_late", before)

    async def _other(self, name: str, before: dict[str, float]) -> bool:
        """Until a number is another one."""
        for _ in range(10_000):
            if self._nixl.numbers()[name] != before[name]:
                return True
            await asyncio.sleep(0.001)
        return False

    async def numbers(self) -> Any:
        return self._nixl.numbers()

    async def close(self) -> Any:
        self._nixl.close()
        return True


async def main(process: Process) -> None:
    while line := await asyncio.to_thread(sys.stdin.readline):
        name, *arguments = json.loads(line)
        print(json.dumps(await getattr(process, name)(*arguments)), flush=True)


if __name__ == "__main__":
    # Without the package's own imports: SGLang's take ten seconds.
    package = types.ModuleType(ADAPTER)
    package.__path__ = [str(Path(__file__).parent.parent / ADAPTER.replace(".", "/"))]
    sys.modules[ADAPTER] = package
    from procs.engine.adapter import nixl

    asyncio.run(main(Process(nixl)))
