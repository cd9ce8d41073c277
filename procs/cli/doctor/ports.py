"""Every TCP port that the node binds: free, or held by whom."""

import errno
import json
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import psutil

from procs.cli.doctor.finding import Finding, error, ok
from procs.cli.doctor.gpu import dp_layout
from procs.cli.doctor.subject import Subject, named

SGLANG_PORT, ZMQ_PORT_DELTA, ZMQ_PORTS = 30000, 233, 6
"""SGLang 0.5.23 with DP attention: the ports behind --dist-init-addr, or behind --port and this delta (PortArgs.init_new)."""
ANY = "0.0.0.0"


@dataclass(frozen=True)
class Port:
    flag: str
    """What chooses it, for a person."""
    host: str
    number: int
    needed: bool = True
    """It listens all the time that the node is up."""


def wanted(subject: Subject) -> Iterator[Port]:
    """The ports of the configuration; 0, any free one, is left out."""
    config = subject.config
    assert config is not None
    ports = [Port("--system-port", config.system_host, config.system_port)]
    if config.frontend and config.leads:
        ports.append(Port("--http-port", config.http_host, config.http_port))
    if config.nnodes > 1 and config.leads:
        ports.append(Port("--group-port", *config.group_address))
    if not subject.synthetic:
        ports += _sglang(subject)
    yield from (port for port in ports if port.number)


def _sglang(subject: Subject) -> Iterator[Port]:
    config = subject.config
    assert config is not None
    ranks, shared, _ = dp_layout(config)
    if config.leads:
        base, host = subject.number("--port", SGLANG_PORT) + ZMQ_PORT_DELTA, "127.0.0.1"
        if config.dist_init_addr:
            host, _, text = config.dist_init_addr.rpartition(":")
            host, base = host.strip("[]"), int(text)
            yield Port("--dist-init-addr", host, base, needed=False)
        if shared:
            why = "--dist-init-addr's, for DP attention" if config.dist_init_addr else "--port's, for DP attention"
            first = base + 1 if base + ZMQ_PORTS <= 65535 else base - ZMQ_PORTS - 1
            yield from (Port(why, host, first + i, needed=False) for i in range(ZMQ_PORTS))
    if config.role in ("prefill", "mm_prefill"):
        yield Port(
            "--disaggregation-bootstrap-port",
            subject.flag("--host") or "127.0.0.1",
            subject.number("--disaggregation-bootstrap-port", 8998),
        )
    if number := subject.number("--nccl-port", 0):
        yield Port("--nccl-port", "127.0.0.1", number, needed=False)
    if config.dynamo.use_kv_events:
        mine = range(ranks)
        if shared:
            each = ranks // config.nnodes
            mine = range(config.node_rank * each, (config.node_rank + 1) * each)
        elif not config.leads:
            return
        given = json.loads(subject.flag("--kv-events-config") or "{}")
        for name in ("endpoint", "replay_endpoint"):
            match = re.fullmatch(r"tcp://(.+):([0-9]+)", given.get(name) or ("tcp://*:5557" if name == "endpoint" else ""))
            if match:
                host = ANY if match[1] == "*" else match[1].strip("[]")
                yield from (Port(f"--kv-events-config {name}", host, int(match[2]) + rank) for rank in mine)


def check(subject: Subject) -> Iterator[Finding]:
    if subject.config is None:
        return
    ports = list(wanted(subject))
    yield from doubled(ports)
    listening = listeners()
    for port in ports:
        yield from (
            held(port, listening.get(port.number, []), subject) if subject.running else free(port, listening.get(port.number, []))
        )


def doubled(ports: Iterable[Port]) -> Iterator[Finding]:
    """Two flags that take the same port."""
    seen: dict[int, Port] = {}
    for port in ports:
        other = seen.setdefault(port.number, port)
        if other is not port and (other.host == port.host or ANY in (other.host, port.host)):
            yield error("port", f"{port.number} is both {other.flag} and {port.flag}", f"another {port.flag}")


def listeners() -> dict[int, list[int]]:
    """Pids by port; 0 for a process that this user can't look into."""
    found: dict[int, list[int]] = {}
    for each in psutil.net_connections("tcp"):
        if each.status == psutil.CONN_LISTEN and each.laddr:
            found.setdefault(each.laddr.port, []).append(each.pid or 0)
    return found


def free(port: Port, holders: list[int]) -> Iterator[Finding]:
    """Before a start. Bound and given back at once, as `sgnode serve` does."""
    name = f"{port.flag} {port.number}"
    probe = socket.socket(socket.AF_INET6 if ":" in port.host else socket.AF_INET)
    with probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((port.host, port.number))
            probe.listen(1)
        except OSError as failure:
            if failure.errno == errno.EADDRINUSE:
                yield error(
                    "port", f"{name} on {port.host} is held by {_who(holders)}", f"end it, or pass another {port.flag.split()[0]}"
                )
            elif isinstance(failure, socket.gaierror) or failure.errno == errno.EADDRNOTAVAIL:
                yield error(
                    "port", f"{name}: {port.host} is not an address of this machine", "an address of this machine, or 0.0.0.0"
                )
            else:
                yield error("port", f"{name} on {port.host}: {failure.strerror}", "a port from 1024, or another address")
            return
    yield ok("port", f"{name} on {port.host} is free")


def held(port: Port, holders: list[int], subject: Subject) -> Iterator[Finding]:
    """On a running node."""
    name = f"{port.flag} {port.number}"
    ours = [pid for pid in holders if pid and subject.owns(pid)]
    if ours:
        yield ok("port", f"{name}: pid {ours[0]} of this node")
    elif any(holders):
        yield error(
            "port", f"{name} is held by {_who(holders)}, not by this node", "end it, or restart the node with another port"
        )
    elif holders:
        yield ok("port", f"{name}: a process that this user can't look into")
    elif port.needed:
        yield error("port", f"{name}: nobody listens", "`sgnode status`: is the process up that it belongs to?")


def _who(holders: list[int]) -> str:
    known = [pid for pid in dict.fromkeys(holders) if pid]
    return ", ".join(named(pid) for pid in known) or "a process of another user (look as root: `ss -ltnp`)"
