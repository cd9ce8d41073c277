"""The group's sockets: ROUTER at the leader, DEALER at a follower, TCP, what their connections come to (ZMQ's monitor)."""

import asyncio
import logging
import socket
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

from shared import group_key as keys
from shared.frames import Epoch, FromLeader, Member, Refused, ToLeader
from shared.group_key import Key
from shared.sockets import Decoder, LoopSocket, encode

HWM = 64
"""Frames say everything anew: a peer that is so many behind needs the newest, and gets it when it reconnects."""
MAX_BYTES = 1 << 20
HEARTBEAT_MS = 500
"""ZMTP's own heartbeat: a connection that died silently is closed after the group's deadline, and made anew."""
CONNECT_MS = 1000
"""For one attempt to connect: the kernel would try the same one for two minutes."""
RETRY_MS = (100, 200)
"""A coordinator that was killed is back after a second, and has to be heard within the group's deadline."""
RENEW_SECONDS = 1.0
"""After a handshake that failed: libzmq 4.3 gives some of these up for good."""
SAY_SECONDS = 60.0
"""Who is refused is logged at most so often."""
HANDSHAKE_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
Context = zmq.Context[zmq.Socket[bytes]]


def tcp(host: str, port: int) -> str:
    """ZMQ's address of a host and port; a name is looked up, for ZMQ binds addresses only. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return f"tcp://[{address[0]}]:{port}" if family == socket.AF_INET6 else f"tcp://{address[0]}:{port}"


def _options(sock: zmq.Socket[bytes], deadline: float) -> None:
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.SNDHWM, HWM)
    sock.setsockopt(zmq.RCVHWM, HWM)
    sock.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
    sock.setsockopt(zmq.IPV6, 1)
    sock.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(deadline * 1000))
    sock.setsockopt(zmq.HANDSHAKE_IVL, int(deadline * 1000))


class LeaderLink:
    """The leader's end. ``hear`` gets each Member and answers with a Refused or None; who is not refused gets every Epoch."""

    def __init__(
        self, context: Context, address: str, key: Key | None, deadline: float, hear: Callable[[Member], Refused | None]
    ) -> None:
        """Raises zmq.ZMQError when the address can't be bound."""
        sock = context.socket(zmq.ROUTER)
        _options(sock, deadline)
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        keys.use(sock, key, server=True)
        monitor = sock.get_monitor_socket(HANDSHAKE_FAILED)
        try:
            sock.bind(address)
        except zmq.ZMQError:
            sock.disable_monitor()
            monitor.close(0)
            sock.close(0)
            raise
        self._hear = hear
        self._decoder: Decoder[Member] = Decoder(ToLeader, "the group's socket")
        self._peers: dict[int, bytes] = {}
        """By rank, the identity of its newest connection."""
        self._said: dict[str, float] = {}
        self._raw = sock
        self._monitor = LoopSocket(monitor, self._failed)
        self._socket = LoopSocket(sock, self._receive)

    def _receive(self, parts: list[bytes]) -> None:
        if len(parts) != 2 or (member := self._decoder.decode(parts[1])) is None:
            return
        before = self._peers.get(member.node_rank)
        self._peers[member.node_rank] = parts[0]  # what it says may be answered at once
        refused = self._hear(member)
        if refused is None:
            return
        del self._peers[member.node_rank]
        if before is not None:
            self._peers[member.node_rank] = before
        self._log(refused.reason)
        self._send(parts[0], encode(refused))

    def _failed(self, _parts: list[bytes]) -> None:
        self._log(f"a node that has not the group's key was refused: is {keys.FLAG} the same on every node?")

    def _log(self, line: str) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._said.get(line, -SAY_SECONDS) >= SAY_SECONDS:
            self._said[line] = now
            logging.error("%s", line)

    def say(self, epoch: Epoch) -> None:
        """Send to every rank that has been heard."""
        data = encode(epoch)
        for rank, identity in list(self._peers.items()):
            if not self._send(identity, data):
                del self._peers[rank]

    def _send(self, identity: bytes, data: bytes) -> bool:
        try:
            self._socket.send([identity, data])
        except zmq.ZMQError:  # gone, or far behind: it is heard again when it is back
            return False
        return True

    def close(self) -> None:
        """What was said last may still leave."""
        self._raw.disable_monitor()
        self._monitor.close()
        self._socket.close(linger=200)


class FollowerLink:
    """A follower's end. ``hear`` gets each frame of the leader, ``trouble`` why there is no connection (empty: there is one)."""

    def __init__(
        self,
        context: Context,
        place: tuple[str, int],
        key: Key | None,
        deadline: float,
        hear: Callable[[FromLeader], None],
        trouble: Callable[[str], None],
    ) -> None:
        self._context = context
        self._place = place
        self._key = key
        self._deadline = deadline
        self._hear = hear
        self._trouble = trouble
        self._decoder: Decoder[FromLeader] = Decoder(FromLeader, "the group's socket")
        self._loop = asyncio.get_running_loop()
        self._renewing: asyncio.TimerHandle | None = None
        self._socket: LoopSocket | None = None
        self._open()

    def _open(self) -> None:
        self._renewing = None
        try:
            address = tcp(*self._place)
        except OSError as error:
            self._trouble(f"{self._place[0]}: {error.strerror}")
            self._renew()
            return
        sock = self._context.socket(zmq.DEALER)
        _options(sock, self._deadline)
        sock.setsockopt(zmq.IMMEDIATE, 1)  # nothing is kept for a leader that isn't there: it would be stale
        sock.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
        sock.setsockopt(zmq.RECONNECT_IVL, RETRY_MS[0])
        sock.setsockopt(zmq.RECONNECT_IVL_MAX, RETRY_MS[1])
        keys.use(sock, self._key, server=False)
        monitor = sock.get_monitor_socket(HANDSHAKE_FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        sock.connect(address)
        self._raw = sock
        self._monitor = LoopSocket(monitor, self._event)
        self._socket = LoopSocket(sock, self._receive)

    def _receive(self, parts: list[bytes]) -> None:
        frame = self._decoder.decode(parts[0])
        if frame is not None:
            self._hear(frame)

    def _event(self, parts: list[bytes]) -> None:
        event = parse_monitor_message(parts)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._trouble("")
        elif event & HANDSHAKE_FAILED:
            self._trouble(f"it does not take this node's key: is {keys.FLAG} the same there?")
            self._renew()

    def _renew(self) -> None:
        """Begin anew in a while."""
        if self._renewing is None:
            self._renewing = self._loop.call_later(RENEW_SECONDS, self._again)

    def _again(self) -> None:
        self._close(0)
        self._open()

    def say(self, member: Member) -> None:
        """Send, if there is a connection."""
        if self._socket is not None:
            try:
                self._socket.send([encode(member)])
            except zmq.ZMQError:
                return  # not connected, or far behind: the next frame says the same

    def _close(self, linger: int) -> None:
        if self._socket is not None:
            self._raw.disable_monitor()
            self._monitor.close()
            self._socket.close(linger=linger)
            self._socket = None

    def close(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
        self._close(200)
