"""Interfaces that NCCL and gloo are told to use, InfiniBand devices, and the group's address."""

import ipaddress
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from procs.cli.doctor.finding import Finding, error, ok, warning
from procs.cli.doctor.subject import Subject
from shared import group_key
from shared.errors import NodeError

CONNECT_SECONDS = 2.0
INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class Interface:
    up: bool
    mtu: int = 1500
    addresses: list[str] = field(default_factory=list)


def interfaces() -> dict[str, Interface]:
    addresses = psutil.net_if_addrs()
    return {
        name: Interface(stats.isup, stats.mtu, [each.address.partition("%")[0] for each in addresses.get(name, [])])
        for name, stats in psutil.net_if_stats().items()
    }


def infiniband(root: Path = INFINIBAND) -> dict[str, bool]:
    """RDMA devices, and whether a port of each is active."""
    found = {}
    for device in sorted(root.iterdir()) if root.is_dir() else ():
        states = [path.read_text() for path in device.glob("ports/*/state")]
        found[device.name] = any("ACTIVE" in state for state in states)
    return found


def check(subject: Subject) -> Iterator[Finding]:
    here = interfaces()
    yield from named_interfaces(subject.environ, here)
    asked = (subject.flag("--disaggregation-ib-device") or "").split(",") if subject.config is not None else []
    yield from rdma(infiniband(), subject.environ.get("NCCL_IB_HCA", ""), [each.strip() for each in asked if each.strip()])
    if subject.config is not None and subject.config.nnodes > 1:
        yield from group(subject, here)


def chosen(variable: str, value: str, here: Mapping[str, Interface]) -> list[str]:
    """Interfaces that a variable means. NCCL's: prefixes, ``=`` before exact names, ``^`` for all others; gloo's: names."""
    exact = variable == "GLOO_SOCKET_IFNAME"
    without = value.startswith("^") and not exact
    text = value.removeprefix("^")
    if text.startswith("=") and not exact:
        exact, text = True, text[1:]
    words = [word.strip() for word in text.split(",") if word.strip()]
    matched = [name for name in here if any(name == word if exact else name.startswith(word) for word in words)]
    return [name for name in here if name not in matched] if without else matched


def named_interfaces(environ: Mapping[str, str], here: Mapping[str, Interface]) -> Iterator[Finding]:
    """NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME."""
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = environ.get(variable)
        if not value:
            continue
        names = chosen(variable, value, here)
        up = [name for name in names if here[name].up]
        if not names:
            have = ", ".join(sorted(here))
            yield error("interface", f"{variable}={value}: no such interface", f"one of {have}")
        elif not up:
            yield error(
                "interface", f"{variable}={value}: {', '.join(names)} is down", f"`ip link set {names[0]} up`, or another one"
            )
        else:
            yield ok("interface", f"{variable}={value}: {', '.join(f'{name}, MTU {here[name].mtu}' for name in up)}")


def rdma(devices: Mapping[str, bool], hca: str, asked: list[str]) -> Iterator[Finding]:
    """``hca``: NCCL_IB_HCA, by prefix with ports; ``asked``: --disaggregation-ib-device."""
    words = [] if hca.startswith("^") else [word.partition(":")[0] for word in hca.lstrip("=").split(",") if word.strip()]
    for variable, missing in (
        (f"NCCL_IB_HCA={hca}", [word for word in words if not any(name.startswith(word) for name in devices)]),
        ("--disaggregation-ib-device", [word for word in asked if word not in devices and not word.startswith(("{", "/"))]),
    ):
        if missing:
            have = ", ".join(devices) or "there is none here"
            yield error("infiniband", f"{variable}: no device {missing[0]}", f"`ibv_devices`; {have}")
    down = [name for name, active in devices.items() if not active]
    used = [name for name in down if name in asked or any(name.startswith(word) for word in words)]
    if used:
        yield error("infiniband", f"{', '.join(used)}: no active port", "`ibstat`: cable, switch, subnet manager")
    elif devices:
        words_down = f", no active port on {', '.join(down)}" if down else ""
        yield ok("infiniband", f"{', '.join(name for name in devices if name not in down) or 'none active'}{words_down}")


def group(subject: Subject, here: Mapping[str, Interface]) -> Iterator[Finding]:
    """--dist-init-addr, --group-port, --group-key-file of a node of several."""
    config = subject.config
    assert config is not None
    address, port = config.group_address
    try:
        resolved = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)})
    except OSError as failure:
        yield error(
            "group",
            f"--dist-init-addr: {address} is not known here: {failure.strerror}",
            "its address, or an entry in /etc/hosts",
        )
        return
    own = {each: name for name, interface in here.items() for each in interface.addresses}
    yield from placed(config.node_rank, address, resolved, own)
    for each in resolved:
        if name := own.get(each):
            yield ok("group", f"{address} is {name} here, MTU {here[name].mtu}")
    if config.node_rank > 0:
        try:
            socket.create_connection((address, port), CONNECT_SECONDS).close()
            yield ok("group", f"the leader answers at {address}:{port}")
        except OSError as failure:
            words = f"nobody answers at {address}:{port} yet: {failure.strerror or failure}"
            yield warning("group", words, "start rank 0 (any order is fine), or open the port in its firewall")
    if config.group_key_file is None:
        yield warning(
            "group",
            f"no --group-key-file: whoever reaches {address}:{port} can join",
            "`sgnode group-key FILE`, the same file on every node",
        )
    else:
        try:
            group_key.load(config.group_key_file)
        except NodeError as failure:
            yield error("group", str(failure), "`sgnode group-key FILE` makes one")


def placed(rank: int, address: str, resolved: list[str], own: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the leader's address can be the leader's."""
    loopback = all(ipaddress.ip_address(each.partition("%")[0]).is_loopback for each in resolved)
    if loopback:
        yield warning(
            "group",
            f"--dist-init-addr {address} is loopback: no other machine reaches it",
            "an address of rank 0 that every node reaches",
        )
    elif rank > 0 and any(each in own for each in resolved):
        words = f"--dist-init-addr {address} is this machine's own, and this is rank {rank}"
        yield warning("group", words, "fine for two ranks on one machine; otherwise the address of rank 0")
    elif rank == 0 and not any(each in own for each in resolved):
        have = ", ".join(each for each, name in own.items() if name != "lo" and "." in each)
        words = f"--dist-init-addr {address} is not an address of this machine, and this is rank 0"
        yield error("group", words, f"one of {have or 'its addresses'}, or --node-rank")
