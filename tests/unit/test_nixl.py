"""NIXL between real processes: what is read is what is there; a peer's death or pause costs its own transfers only."""

import base64
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import nixl as host
from shared.errors import Code
from tests.harness import send, wait_for
from tests.nixl_peer import Peer

if host.libraries() is None:
    pytest.skip("NIXL is not installed", allow_module_level=True)

TCP = "tcp,self"
"""As between hosts: the peer has to take part. On one host UCX copies memory past it."""
MB = 1 << 20
IDLE = {"nixl_registered": 0, "nixl_late": 0, "nixl_late_bytes": 0}


def held(process: Peer) -> dict[str, float]:
    """Its numbers, without those that only grow."""
    return {name: value for name, value in process("numbers").items() if name in IDLE}


@pytest.fixture(scope="module")
def near() -> Iterator[tuple[Peer, Peer]]:
    """A reader and its peer, as they are on one host."""
    with Peer() as reader, Peer() as peer:
        yield reader, peer


@pytest.fixture(scope="module")
def reader() -> Iterator[Peer]:
    with Peer(TCP) as reader:
        yield reader
        assert reader.process.poll() is None, "it outlives all of its peers' ends"


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer(TCP) as peer:
        yield peer


def test_what_is_read_equals_what_is_there_and_200_reads_leave_nothing(near: tuple[Peer, Peer]) -> None:
    reader, peer = near
    found = []
    sizes = [4096 + 97 * number if number % 50 else 4 * MB for number in range(201)]
    for number, size in enumerate(sizes):
        which, metadata = peer("share", size, number)
        assert reader("read", metadata, size, 10) == [number]
        assert peer("fetched", which) and peer("withdraw", which)
        if number in (1, 200):
            found.append((reader.descriptors(), peer.descriptors()))
    assert found[0] == found[1]
    assert reader("numbers")["nixl_read_bytes"] == sum(
        4 * MB if number % 50 == 0 else 4096 + 97 * number for number in range(201)
    )
    assert held(reader) == IDLE
    wait_for("the peer has let go of everything", lambda: held(peer) == IDLE, 10)


def test_what_nobody_has_read_stays_for_one_who_comes_late(near: tuple[Peer, Peer]) -> None:
    reader, peer = near
    which, metadata = peer("share", MB, 7)
    peer("withdraw", which)
    wait_for("it is kept", lambda: held(peer)["nixl_late_bytes"] == MB, 10)
    assert reader("read", metadata, MB, 10) == [7]
    wait_for("it is let go of", lambda: held(peer) == IDLE, 10)


def test_what_was_withdrawn_unread_is_bounded(near: tuple[Peer, Peer]) -> None:
    reader, peer = near
    kept = [peer("share", 64 * MB, value) for value in range(4)]
    for which, _ in kept:
        peer("withdraw", which)
    wait_for("they are kept", lambda: held(peer)["nixl_late_bytes"] == 256 * MB, 10)
    code, words = peer("share", 1, 7)
    assert code == Code.OVERLOADED and "256 MB wait" in words
    for value, (_, metadata) in enumerate(kept):
        assert reader("read", metadata, 64 * MB, 10) == [value]
    wait_for("they are let go of", lambda: held(peer) == IDLE, 10)
    which, metadata = peer("share", 1, 7)
    assert reader("read", metadata, 1, 10) == [7] and peer("fetched", which) and peer("withdraw", which)


def test_a_peer_that_dies_in_the_middle_ends_its_transfers_alone(reader: Peer, peer: Peer) -> None:
    _, metadata = peer("share", 4 * MB, 1)
    assert reader("read", metadata, 4 * MB, 10) == [1]
    send(peer.pid, signal.SIGSTOP)
    assert reader("begin", metadata, 4 * MB, 60)
    send(peer.pid, signal.SIGKILL)
    code, words = reader("end")
    assert code == Code.PEER_DEAD and "can't be read" in words
    assert reader("read", metadata, 4 * MB, 10)[0] == Code.PEER_DEAD
    assert held(reader) == IDLE
    with Peer(TCP) as another:
        assert reader("read", another("share", MB, 2)[1], MB, 10) == [2]


def test_a_peer_that_stops_has_its_transfers_wait_in_quarantine(reader: Peer, peer: Peer) -> None:
    _, metadata = peer("share", 64 * MB, 3)
    assert reader("read", metadata, 64 * MB, 10) == [3]
    before = reader.descriptors()
    send(peer.pid, signal.SIGSTOP)
    for count in (1, 2, 3):
        code, words = reader("read", metadata, 64 * MB, 0.2)
        assert code == Code.PEER_DEAD and "within 0.2 s" in words
        assert held(reader) == {"nixl_registered": count, "nixl_late": count, "nixl_late_bytes": count * 64 * MB}
    assert reader("begin", metadata, 64 * MB, 60) and reader("cancel")
    assert held(reader)["nixl_late_bytes"] == 256 * MB
    code, words = reader("read", metadata, 64 * MB, 0.2)
    assert code == Code.OVERLOADED and "256 MB wait" in words
    send(peer.pid, signal.SIGCONT)
    wait_for("the late ones have ended", lambda: held(reader) == IDLE, 30)
    assert reader("read", metadata, 64 * MB, 10) == [3]
    assert reader.descriptors() <= before + 1


def test_what_describes_no_memory_is_refused_before_anything_is_taken(near: tuple[Peer, Peer]) -> None:
    reader, peer = near
    _, good = peer("share", MB, 1)
    known = base64.b64decode(good["nixl_metadata"][4:])
    packed = lambda data: "b64:" + base64.b64encode(data).decode()  # noqa: E731
    elsewhere = {"device": "cpu", "ptr": good["descriptors"][0]["ptr"] + (1 << 40), "size": MB}
    wrong = {
        "another size": {**good, "descriptors": [{**good["descriptors"][0], "size": 1 << 50}]},
        "two pieces": {**good, "descriptors": good["descriptors"] * 2},
        "none": {**good, "descriptors": []},
        "no address": {**good, "descriptors": [{"device": "cpu", "ptr": 0, "size": MB}]},
        "memory that it doesn't share": {**good, "descriptors": [elsewhere]},
        "a write": {**good, "operation_kind": 2},
        "no base64": {**good, "nixl_metadata": "b64:?"},
        "not packed": {**good, "nixl_metadata": "b64:AAAA"},
        "cut off": {**good, "nixl_metadata": packed(known[:-20])},
        "a bomb": {**good, "nixl_metadata": packed(zlib.compress(bytes(64 * MB)))},
        "of no agent": {**good, "nixl_metadata": packed(zlib.compress(b"nixlSerDes|nothing"))},
    }
    for name, metadata in wrong.items():
        assert reader("read", metadata, MB, 10)[0] == Code.INVALID, name
    assert held(reader) == IDLE
    assert reader("read", good, MB, 10) == [1]


def test_an_agent_ends(near: tuple[Peer, Peer]) -> None:
    for process in near:
        before = process.descriptors()
        assert process("close")
        assert process("numbers") == {}
        assert process.descriptors() < before


def test_infiniband_stays_where_there_is_some_and_what_the_operator_says_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "infiniband"
    monkeypatch.setattr(host, "INFINIBAND", place)
    assert host.environment({}) == {"UCX_MODULES": "^ib"}
    place.mkdir()
    assert host.environment({}) == {"UCX_MODULES": "^ib"}
    assert host.environment({"UCX_MODULES": "all"}) == {}
    (place / "mlx5_0").mkdir()
    assert host.environment({}) == {}


def test_without_nixl_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "DISTRIBUTIONS", ("nixl-none",))
    assert host.libraries() is None
