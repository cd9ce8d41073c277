"""Two hosts on one machine: network namespaces with a cable (veth) between them, and one from here to the first."""

import json
import os
import subprocess
from typing import Any

CABLE = ("10.99.7.1", "10.99.7.2")
"""Addresses of the two hosts on their cable."""
CLIENT = ("10.99.8.254", "10.99.8.1")
"""Ours, and the first host's."""


def ip(*arguments: str) -> str:
    """iproute2's ip; raises CalledProcessError."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20).stdout


class Hosts:
    """``names`` of the two namespaces, ``ends`` of the cable's interfaces in them."""

    def __init__(self) -> None:
        mark = f"{os.getpid() % 0xFFFFF:x}"
        self.names = [f"sgn{mark}a", f"sgn{mark}b"]
        self.ends = [f"sgn{mark}x", f"sgn{mark}y"]
        client = f"sgn{mark}c", f"sgn{mark}d"
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", self.ends[0], "netns", self.names[0], "type", "veth", "peer", self.ends[1], "netns", self.names[1])
        for name, end, address in zip(self.names, self.ends, CABLE, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
        ip("link", "add", client[0], "type", "veth", "peer", client[1], "netns", self.names[0])
        ip("address", "add", f"{CLIENT[0]}/24", "dev", client[0])
        ip("link", "set", client[0], "up")
        ip("-n", self.names[0], "address", "add", f"{CLIENT[1]}/24", "dev", client[1])
        ip("-n", self.names[0], "link", "set", client[1], "up")

    def enter(self, host: int) -> list[str]:
        """What to put before a command so that it runs on a host: its network, and shared memory of its own (SGLang looks there
        whether two ranks are on one machine)."""
        own_memory = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        network = ["nsenter", f"--net=/run/netns/{self.names[host]}"]
        return [*network, "unshare", "--mount", "--propagation", "private", "sh", "-c", own_memory, "sh"]

    def cable(self, state: str) -> None:
        """Pull the cable (``down``) or put it back (``up``)."""
        ip("-n", self.names[1], "link", "set", self.ends[1], state)

    @property
    def carrier(self) -> bool:
        """The first host sees the other end of the cable."""
        link: dict[str, Any] = json.loads(ip("-j", "-n", self.names[0], "link", "show", self.ends[0]))[0]
        return "LOWER_UP" in link["flags"]

    def close(self) -> None:
        """The namespaces' interfaces go with them, and ours with its peer."""
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20)
