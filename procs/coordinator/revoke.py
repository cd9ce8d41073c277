"""Takes out of discovery what dead agents left there: by itself it would get requests until its TTL ends (7 to 30 s).

Order doesn't matter: a worker id is one process's and never given out again, neither by the file store (a random number)
nor by etcd (the lease that it granted), so a new agent's registration is another one.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote

from shared import etcd
from shared.registrations import Registration, abandoned

LOOK_SECONDS = 1.0
"""What could not be revoked is tried again so often; an agent's death is told by supervisord at once."""


class Revoker:
    """Set ``look`` when an agent may have died."""

    def __init__(self, runtime_dir: Path, environ: Mapping[str, str] = os.environ) -> None:
        self._runtime_dir = runtime_dir
        self._environ = environ
        self._troubled: set[int] = set()
        self.look = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled; the first look is for those that died before this coordinator's life, or the node's."""
        while True:
            self.look.clear()
            await asyncio.to_thread(self.revoke_all)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self.look.wait()

    def revoke_all(self) -> None:
        """Revoke for each dead agent; blocks. What fails is said once and stays for the next time."""
        for path, left in abandoned(self._runtime_dir):
            began = time.monotonic()
            try:
                what = self._revoke(left)
            except etcd.TROUBLE as error:
                if left.worker_id not in self._troubled:
                    logging.warning("worker %d of %s is dead and still in discovery: %s", left.worker_id, left.agent, error)
                self._troubled.add(left.worker_id)
                continue
            path.unlink(missing_ok=True)
            self._troubled.discard(left.worker_id)
            if what:
                took = (time.monotonic() - began) * 1e3
                logging.info("worker %d of %s is dead: revoked %s in %.0f ms", left.worker_id, left.agent, what, took)

    def _revoke(self, left: Registration) -> str:
        """What was revoked, in words; empty when nothing was left."""
        if left.backend == "file":
            count = remove_files(Path(left.store), left.worker_id)
            return f"{count} records of the file store" if count else ""
        if left.backend == "etcd":
            return revoke_lease(left.worker_id, self._environ)
        return ""


def remove_files(store: Path, worker_id: int) -> int:
    """Remove a worker's records from Dynamo 1.6.1's file store: instances and cards. How many there were. Raises OSError.

    Keys are file names: namespace, component, endpoint, the worker id in hexadecimal, on an adapter's card its name. Event
    channels have ids of their own and hold no request: they go by their TTL.
    """
    found = [path for path in store.glob("v1/*/*") if worker_id in _ids(path.name)]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


def _ids(key: str) -> Iterator[int]:
    """What may be the worker id of a record."""
    for part in unquote(key).split("/")[3:]:
        with contextlib.suppress(ValueError):
            yield int(part, 16)


def revoke_lease(lease: int, environ: Mapping[str, str]) -> str:
    """Revoke a lease, and with it all of the worker's keys, at the first endpoint that does it; the words for it.

    Empty when the lease is gone already. Raises ConnectionError with what each endpoint said.
    """
    troubles = []
    for url in etcd.urls(environ):
        try:
            return f"its lease at {url}" if _revoke_at(url, lease, environ) else ""
        except etcd.TROUBLE as error:
            troubles.append(f"etcd at {url}: {error or type(error).__name__}")
    raise ConnectionError("; ".join(troubles))


def _revoke_at(url: str, lease: int, environ: Mapping[str, str]) -> bool:
    with etcd.connected(url, environ) as post:
        return post("/v3/lease/revoke", {"ID": str(lease)}).get("code") != etcd.NOT_FOUND
