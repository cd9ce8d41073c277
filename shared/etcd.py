"""etcd where Dynamo's variables say: its endpoints, and calls by its JSON gateway with a deadline."""

import contextlib
import http.client
import json
import os
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

PORT = 2379
ANSWER_SECONDS = 1.0
"""For each step of a call to one endpoint."""
NOT_FOUND = 5
"""gRPC's code in etcd's JSON: the lease has expired or was revoked."""
TROUBLE = (OSError, ValueError, http.client.HTTPException)
"""What a call raises when the endpoint isn't there, isn't etcd, or refuses."""


class Post(Protocol):
    """One call: ``post("/v3/lease/revoke", {"ID": "1"})``; etcd's answer. Raises one of TROUBLE."""

    def __call__(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]: ...


def urls(environ: Mapping[str, str]) -> list[str]:
    """Each of ETCD_ENDPOINTS as a URL, or etcd's default."""
    texts = (environ.get("ETCD_ENDPOINTS") or f"http://localhost:{PORT}").split(",")
    return [text.strip() if "//" in text else f"http://{text.strip()}" for text in texts]


@contextlib.contextmanager
def connected(url: str, environ: Mapping[str, str]) -> Iterator[Post]:
    """A connection to one endpoint, logged in where ``environ`` says how. Raises one of TROUBLE."""
    parts = urlsplit(url)
    host, port = parts.hostname or "localhost", parts.port or PORT
    connection = http.client.HTTPConnection(host, port, timeout=ANSWER_SECONDS)
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(host, port, timeout=ANSWER_SECONDS, context=_tls(environ))
    with contextlib.closing(connection):
        headers: dict[str, str] = {}
        if login := _login(environ):
            headers["Authorization"] = str(_post(connection, "/v3/auth/authenticate", login, {})["token"])
        yield lambda path, body: _post(connection, path, body, headers)


def _login(environ: Mapping[str, str]) -> dict[str, str]:
    """As Dynamo 1.6.1 reads them: both or none."""
    name, password = environ.get("ETCD_AUTH_USERNAME"), environ.get("ETCD_AUTH_PASSWORD")
    return {} if name is None or password is None else {"name": name, "password": password}


def _post(connection: http.client.HTTPConnection, path: str, body: Mapping[str, Any], headers: dict[str, str]) -> dict[str, Any]:
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
