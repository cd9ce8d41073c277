"""Discovery and the planes beside it: reachable, writable, and on a running node: are its records really there."""

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec

from procs.cli.doctor.finding import Finding, error, ok, warning
from procs.cli.doctor.subject import Subject
from shared import etcd
from shared.config import REGISTRATIONS_DIR
from shared.registrations import Registration, abandoned

CONNECT_SECONDS = 2.0
NATS_PORT = 4222
LEASE_SECONDS = 5
"""Of the lease that is taken and given back to see that etcd takes writes."""


def check(subject: Subject) -> Iterator[Finding]:
    config = subject.config
    if config is None:
        return
    backend = config.dynamo.discovery_backend
    if config.leads:
        if subject.store is not None:
            yield file_store(subject.store)
        elif backend == "etcd":
            yield from etcd_cluster(subject.environ)
        else:
            yield ok("discovery", f"{backend}: not looked at")
    if "nats" in (config.dynamo.request_plane, config.dynamo.event_plane, config.dynamo.response_plane):
        yield nats(subject.environ.get("NATS_SERVER") or f"nats://localhost:{NATS_PORT}")
    if subject.running and config.leads and subject.document:
        yield from records(subject)


def file_store(root: Path) -> Finding:
    """DYN_FILE_KV, or what will be made there."""
    there = next(each for each in (root, *root.parents) if each.exists())
    places = [path for path in (there, root / "v1", root / "v1" / "instances", root / "v1" / "mdc") if path.exists()]
    closed = [path for path in places if not os.access(path, os.W_OK | os.X_OK)]
    if closed:
        return error("discovery", f"the file store can't be written: {closed[0]}", "its owner and mode, or another DYN_FILE_KV")
    return ok("discovery", f"file store {root} can be written")


def etcd_cluster(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Each endpoint takes a lease, and gives it back."""
    answers = {url: etcd_trouble(url, environ) for url in etcd.urls(environ)}
    broken = {url: said for url, said in answers.items() if said}
    for url, said in broken.items():
        todo = "start etcd, or another ETCD_ENDPOINTS (and ETCD_AUTH_*)"
        if len(broken) == len(answers):
            yield error("discovery", f"etcd at {url}: {said}", todo)
        else:
            yield warning("discovery", f"etcd at {url}: {said}; others answer", todo)
    good = [url for url in answers if url not in broken]
    if good:
        yield ok("discovery", f"etcd at {', '.join(good)} gives leases")


def etcd_trouble(url: str, environ: Mapping[str, str]) -> str:
    """What is wrong with an endpoint; empty when it gave a lease."""
    try:
        with etcd.connected(url, environ) as post:
            lease = post("/v3/lease/grant", {"TTL": str(LEASE_SECONDS)})["ID"]
            post("/v3/lease/revoke", {"ID": lease})
    except KeyError:
        return "answers, but not as etcd 3.4 or newer"
    except etcd.TROUBLE as failure:
        return " ".join(str(failure).split()) or type(failure).__name__
    return ""


def nats(servers: str) -> Finding:
    """The first of NATS_SERVER that takes a connection and says INFO."""
    said = []
    for server in servers.split(","):
        place = urlsplit(server.strip() if "//" in server else f"nats://{server.strip()}")
        where = f"{place.hostname or 'localhost'}:{place.port or NATS_PORT}"
        try:
            with socket.create_connection(
                (place.hostname or "localhost", place.port or NATS_PORT), CONNECT_SECONDS
            ) as connection:
                if connection.recv(5) == b"INFO ":
                    return ok("nats", f"{where} answers")
            said.append(f"{where}: answers, but not as NATS")
        except OSError as failure:
            said.append(f"{where}: {failure.strerror or failure}")
    return error("nats", "; ".join(said), "start NATS, or another NATS_SERVER")


def alive(directory: Path) -> list[Registration]:
    """What living agents have written down for themselves."""
    dead = {path for path, _ in abandoned(directory)}
    found = []
    for path in sorted((directory / REGISTRATIONS_DIR).glob("[!.]*")):
        if path not in dead:
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                found.append(msgspec.json.decode(path.read_bytes(), type=Registration))
    return found


def records(subject: Subject) -> Iterator[Finding]:
    """Each living agent's records, in discovery itself."""
    assert subject.directory is not None
    registered = bool(subject.document.get("registered"))
    held = alive(subject.directory)
    missing = []
    for each in held:
        if each.backend not in ("file", "etcd"):
            continue
        there = in_store(Path(each.store), each.worker_id) if each.backend == "file" else in_etcd(each.worker_id, subject.environ)
        if not there:
            missing.append(each)
    yield from judge(registered, held, missing)
    left = len(list(abandoned(subject.directory)))
    if left:
        yield warning(
            "discovery",
            f"{left} dead agents' records are not revoked yet",
            "the coordinator does it each second: its log says why not",
        )


def judge(registered: bool, held: list[Registration], missing: list[Registration]) -> Iterator[Finding]:
    names = ", ".join(f"{each.agent} (worker {each.worker_id})" for each in missing)
    if registered and missing:
        yield error(
            "discovery",
            f"no record of {names}: no router knows it",
            "the agent writes it again within seconds; else `sgnode restart agent`",
        )
    elif registered and held:
        yield ok("discovery", f"the records of {len(held)} agents are there")
    elif registered:
        yield error(
            "discovery", "the node says that it is registered, and no living agent has written so", "`sgnode restart agent`"
        )
    else:
        yield warning("discovery", "the node is not registered", "`sgnode status` says what it waits for")


def in_store(root: Path, worker_id: int) -> bool:
    """An instance record of the worker (Dynamo 1.6.1: a key's parts, percent-encoded, the id in hexadecimal)."""
    return _ends((path.name for path in (root / "v1" / "instances").glob("*")), worker_id)


def _ends(names: Iterable[str], worker_id: int) -> bool:
    return any(unquote(name).endswith(f"/{worker_id:x}") for name in names)


def in_etcd(lease: int, environ: Mapping[str, str]) -> bool:
    """The worker's lease lives and has keys. Raises ConnectionError when no endpoint answers."""
    said = ""
    for url in etcd.urls(environ):
        try:
            with etcd.connected(url, environ) as post:
                answer = post("/v3/lease/timetolive", {"ID": str(lease), "keys": True})
            return int(answer.get("TTL", -1)) > 0 and bool(answer.get("keys"))
        except etcd.TROUBLE as failure:
            said = f"etcd at {url}: {failure}"
    raise ConnectionError(said)
