"""Takes out of discovery what dead agents left there: by itself it would get requests until its TTL ends (7 to 30 s).

Order doesn't matter: a worker id is one process's and never given out again, neither by the file store (a random number)
nor by etcd (the lease that it granted), so a new agent's registration is another one.
"""

import asyncio
import contextlib
import http.client
import json
import logging
import os
import ssl
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from shared import etcd
from shared.registrations import Registration, abandoned

LOOK_SECONDS = 1.0
"""What could not be revoked is tried again so often; an agent's death is told by supervisord at once."""
ANSWER_SECONDS = 1.0
"""For each step of a call to one etcd endpoint."""
NOT_FOUND = 5
"""gRPC's code in etcd's JSON: the lease has expired or was revoked."""


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
            except (OSError, ValueError, http.client.HTTPException) as error:
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
        except (OSError, ValueError, http.client.HTTPException) as error:
            troubles.append(f"etcd at {url}: {error or type(error).__name__}")
    raise ConnectionError("; ".join(troubles))


def _revoke_at(url: str, lease: int, environ: Mapping[str, str]) -> bool:
    parts = urlsplit(url)
    host, port = parts.hostname or "localhost", parts.port or etcd.PORT
    connection = http.client.HTTPConnection(host, port, timeout=ANSWER_SECONDS)
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(host, port, timeout=ANSWER_SECONDS, context=_tls(environ))
    with contextlib.closing(connection):
        headers = {}
        if login := _login(environ):
            headers["Authorization"] = str(_post(connection, "/v3/auth/authenticate", login, {})["token"])
        answer = _post(connection, "/v3/lease/revoke", {"ID": str(lease)}, headers)
    return answer.get("code") != NOT_FOUND


def _login(environ: Mapping[str, str]) -> dict[str, str]:
    """As Dynamo 1.6.1 reads them: both or none."""
    name, password = environ.get("ETCD_AUTH_USERNAME"), environ.get("ETCD_AUTH_PASSWORD")
    return {} if name is None or password is None else {"name": name, "password": password}


def _post(connection: http.client.HTTPConnection, path: str, body: dict[str, str], headers: dict[str, str]) -> dict[str, Any]:
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    text = response.read()
    answer = json.loads(text) if text.startswith(b"{") else {}
    if response.status != http.client.OK and answer.get("code") != NOT_FOUND:
        raise ConnectionError(f"{path}: {answer.get('message') or f'HTTP {response.status}'}")
    return dict(answer)


def _tls(environ: Mapping[str, str]) -> ssl.SSLContext:
    """ETCD_AUTH_CA, _CLIENT_CERT and _CLIENT_KEY hold PEM text for Dynamo 1.6.1; its documentation says paths. Both are taken."""
    context = ssl.create_default_context()
    if authority := environ.get("ETCD_AUTH_CA"):
        context.load_verify_locations(cadata=_pem(authority))
    certificate, key = environ.get("ETCD_AUTH_CLIENT_CERT"), environ.get("ETCD_AUTH_CLIENT_KEY")
    if certificate and key:
        secret = os.memfd_create("etcd-client")  # OpenSSL wants a file; this one is in no file system
        try:
            os.write(secret, f"{_pem(certificate)}\n{_pem(key)}\n".encode())
            context.load_cert_chain(f"/proc/self/fd/{secret}")
        finally:
            os.close(secret)
    return context


def _pem(value: str) -> str:
    return value if "-----BEGIN" in value else Path(value).read_text()
