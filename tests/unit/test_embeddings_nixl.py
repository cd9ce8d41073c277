"""Embeddings over NIXL between real processes: equal, withdrawn, late; the death of either end costs its own only."""

import signal
from collections.abc import Iterator

import pytest

from shared import nixl as host
from tests.embeddings_peer import Peer
from tests.harness import send, wait_for

if host.libraries() is None:
    pytest.skip("NIXL is not installed", allow_module_level=True)

Ends = tuple[Peer, Peer]
FREE = [0, 0]


@pytest.fixture(params=["nixl-write", "nixl-read"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """A sender and a receiver."""
    yield from _ends(request.param)


@pytest.fixture
def writing() -> Iterator[Ends]:
    yield from _ends("nixl-write")


@pytest.fixture
def over_tcp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    """As between hosts: within one the kernel copies at once."""
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    yield from _ends("nixl-write")


def _ends(mode: str) -> Iterator[Ends]:
    sender, receiver = Peer(mode), Peer(mode)
    with sender, receiver:
        assert sender("outbox") and receiver("inbox")
        yield sender, receiver


def test_what_comes_is_what_was_offered_and_nothing_is_left(ends: Ends) -> None:
    sender, receiver = ends
    for number, rows in enumerate((3, 1000, 16000, 1, 77)):
        which, transfer = sender("offer", rows, number)
        assert receiver("fetch", transfer, 10) == [number]
        assert sender("fetched", which, 5) is True
        sender("withdraw", which)
    if sender.mode == "nixl-write":
        assert receiver("writing") == FREE
        wait_for("the sender has let go of everything", lambda: sender("writing") == FREE, 5)


def test_what_is_announced_otherwise_than_it_is_said_to_be_is_refused(ends: Ends) -> None:
    sender, receiver = ends
    _, transfer = sender("offer", 10, 1)
    assert receiver("fetch", {**transfer, "embeddings_shape": [1000, 512]}, 5) == "invalid_argument"
    assert receiver("fetch", {**transfer, "serialized_request": "{}"}, 5) == "invalid_argument"
    assert receiver("fetch", transfer, 5) == [1]


def test_a_killed_receiver_leaves_nothing_at_the_sender_and_the_next_one_is_served(ends: Ends) -> None:
    sender, receiver = ends
    which, transfer = sender("offer", 1000, 1)
    send(receiver.pid, signal.SIGKILL)
    assert sender("fetched", which, 0.2) == "TimeoutError"
    sender("withdraw", which)
    if sender.mode == "nixl-write":
        wait_for("the sender has let go of it", lambda: sender("writing") == FREE, 5)
    with Peer(sender.mode) as another:
        assert another("inbox")
        which, transfer = sender("offer", 1000, 2)
        assert another("fetch", transfer, 10) == [2]


def test_a_killed_sender_costs_its_own_embeddings_only(ends: Ends) -> None:
    sender, receiver = ends
    _, transfer = sender("offer", 1000, 1)
    send(sender.pid, signal.SIGKILL)
    # One that writes may be met without a word that it is gone: then there is the deadline.
    assert receiver("fetch", transfer, 2) in ("peer_dead", "nixlBackendError", "nixlRemoteDisconnectError", "TimeoutError")
    with Peer(sender.mode) as another:
        assert another("outbox")
        _, transfer = another("offer", 1000, 2)
        assert receiver("fetch", transfer, 10) == [2]
    if sender.mode == "nixl-write":
        wait_for("its range is free", lambda: receiver("writing") == FREE, 10)


def test_withdrawn_embeddings_are_not_waited_for(writing: Ends) -> None:
    sender, receiver = writing
    which, transfer = sender("offer", 10, 1)
    sender("withdraw", which)
    assert receiver("fetch", transfer, 5) == "peer_dead"
    assert receiver("writing") == sender("writing") == FREE


def test_a_late_write_hits_nobody_else(writing: Ends) -> None:
    """The sender's loop stands still until its receiver has given up, and then writes."""
    sender, receiver = writing
    late, first = sender("offer", 1000, 4)
    sender("block", 3)
    assert receiver("fetch", first, 0.5) == "TimeoutError"
    wait_for("its range is kept", lambda: receiver("writing")[1] == 1, 5)
    wait_for("the late write has come", lambda: receiver("writing") == FREE, 10)
    assert sender("fetched", late, 5) is True
    _, second = sender("offer", 1000, 5)
    assert receiver("fetch", second, 10) == [5]


def test_a_range_is_free_again_when_its_sender_has_died(writing: Ends) -> None:
    sender, receiver = writing
    _, transfer = sender("offer", 1000, 4)
    send(sender.pid, signal.SIGSTOP)
    assert receiver("fetch", transfer, 0.5) == "TimeoutError"
    wait_for("its range is kept", lambda: receiver("writing")[1] == 1, 5)
    send(sender.pid, signal.SIGKILL)
    wait_for("its range is free", lambda: receiver("writing") == FREE, 10)


def test_embeddings_withdrawn_while_they_are_written_to_a_stopped_receiver_harm_nobody(over_tcp: Ends) -> None:
    sender, receiver = over_tcp
    _, first = sender("offer", 1000, 1)
    assert receiver("fetch", first, 20) == [1]
    which, transfer = sender("offer", 200_000, 2)
    sender("block", 2)
    receiver("begin", transfer, 30)
    wait_for("the sender is asked", lambda: receiver("writing") != FREE, 5)
    send(receiver.pid, signal.SIGSTOP)
    wait_for("it is being written", lambda: sender("writing")[1] == 1, 20, every=0.2)
    sender("withdraw", which)
    assert sender("writing")[1] == 1, "its memory stays"
    send(receiver.pid, signal.SIGCONT)
    wait_for("it is over", lambda: sender("writing") == FREE, 20, every=0.2)
    _, again = sender("offer", 1000, 3)
    assert receiver("fetch", again, 20) == [3]
