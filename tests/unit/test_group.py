"""The group's pure rooms and its key, and both ends of its link on loopback."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from procs.coordinator.group.follower import Follower
from procs.coordinator.group.leader import SKEW_SECONDS, START_SECONDS, Leader
from procs.coordinator.group.link import FollowerLink, LeaderLink
from shared import group_key as key
from shared.epoch import Started
from shared.errors import NodeError
from shared.frames import PROTOCOL, Epoch, FromLeader, Member, Refused
from shared.group_key import Key
from tests.groups import dist_port

DEADLINE = 2.0
NOW = 100.0
WALL = 1_700_000_000.0
FACTS = {"tp size": "8", "model": "/m"}


def leader(nnodes: int = 2, **more: Any) -> Leader:
    return Leader(nnodes, FACTS, "life", "group", DEADLINE, NOW, **more)


def member(rank: int = 1, number: int = 1, **changes: Any) -> Member:
    """What a rank says that hasn't heard anything yet."""
    made = Member(
        PROTOCOL, rank, f"life-{rank}", f"node-{rank}", f"h{rank}", number, "", 0, "", 0, "none", "", "serve", WALL, FACTS
    )
    return msgspec.structs.replace(made, **changes)


def heard(room: Leader, now: float = NOW, **changes: Any) -> None:
    """Every rank says that it has heard the leader's newest frame."""
    frame = room.frame(now)
    for rank, known in room.ranks.items():
        number = 1 if known.member is None else known.member.number + 1
        said = member(rank, number, **({"leader": frame.life, "heard": frame.number} | changes))
        assert room.hear(said, now, WALL) is None


def opened(nnodes: int = 2) -> Leader:
    """A leader whose first epoch is open, with every engine up."""
    room = leader(nnodes)
    heard(room)
    started = room.start(NOW)
    heard(room, group=started.group, epoch=started.epoch, engine="up")
    assert room.open
    assert not room.look(NOW)
    return room


def follower(*, engine: str = "none", ran: Started | None = None) -> Follower:
    return Follower(1, 4, "10.0.0.1:7100", "h1", "node-1", FACTS, "life-1", DEADLINE, NOW, ran or Started(), engine)


def epoch(number: int = 1, **changes: Any) -> Epoch:
    made = Epoch(PROTOCOL, "life", number, "group", 1, True, True, "", "", "ready", "")
    return msgspec.structs.replace(made, **changes)


# --- the leader: what it waits for ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nnodes", "seen", "words"),
    [
        (4, {1, 3}, "rank 2 of 4 not seen, 74 s"),
        (4, {1}, "ranks 2, 3 of 4 not seen, 74 s"),
        (8, {2, 6, 7}, "ranks 1, 3-5 of 8 not seen, 74 s"),
        (1000, set(), "ranks 1-999 of 1000 not seen, 74 s"),
        (4, {1, 2, 3}, ""),
    ],
)
def test_ranks_that_are_missing(nnodes: int, seen: set[int], words: str) -> None:
    room = leader(nnodes)
    number = room.frame(NOW).number
    for rank in seen:
        assert room.hear(member(rank, leader="life", heard=number), NOW + 74, WALL) is None
    assert room.unmet(NOW + 74) == words


def test_a_rank_that_went_silent_is_missing_again() -> None:
    room = leader()
    heard(room)
    assert room.unmet(NOW + DEADLINE) == ""
    assert room.unmet(NOW + 5) == "rank 1 of 2 not seen, 5 s"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"want": "stop"}, "rank 1 (h1), which is stopping"),
        ({"engine": "dead", "reason": "scheduler killed"}, "the end of the engine of rank 1 (h1)"),
        ({"engine": "dead"}, "the end of the engine of rank 1 (h1)"),
        ({"engine": "up"}, "the end of the engine of rank 1 (h1)"),
        ({"heard": 0}, "rank 1 (h1) to hear that no epoch is open"),
        ({"leader": "an earlier life"}, "rank 1 (h1) to hear that no epoch is open"),
        ({"want": "drain"}, ""),
    ],
)
def test_what_a_rank_is_waited_for(changes: dict[str, Any], words: str) -> None:
    room = leader()
    heard(room, **changes)
    assert room.unmet(NOW) == words
    assert room.frame(NOW).waiting_for == words


def test_what_was_heard_of_the_epoch_before_does_not_open_the_next() -> None:
    room = leader()
    heard(room)
    before = room.frame(NOW).number
    room.start(NOW)
    room.end("rank 0: its engine is gone")
    assert room.hear(member(1, 7, leader="life", heard=before), NOW, WALL) is None
    assert room.unmet(NOW) == "rank 1 (h1) to hear that no epoch is open"
    heard(room)
    assert room.unmet(NOW) == ""
    assert room.start(NOW) == Started("group", 2)


@pytest.mark.parametrize(
    ("theirs", "clock", "words"),
    [
        (FACTS, 0.0, []),
        (FACTS | {"tp size": "4"}, 0.0, ["rank 1 (h1): tp size is 4, on the leader 8"]),
        ({"model": "/m"}, 0.0, ["rank 1 (h1): tp size is -, on the leader 8"]),
        (FACTS | {"pp size": "2"}, 0.0, ["rank 1 (h1): pp size is 2, on the leader -"]),
        (FACTS, SKEW_SECONDS + 1.5, ["rank 1 (h1): its clock is 3.5 s ahead of the leader's"]),
        (FACTS, -SKEW_SECONDS - 1.5, ["rank 1 (h1): its clock is 3.5 s behind the leader's"]),
        (FACTS, SKEW_SECONDS - 0.1, []),
        (FACTS, 0.1 - SKEW_SECONDS, []),
    ],
)
def test_differences(theirs: dict[str, str], clock: float, words: list[str]) -> None:
    room = leader()
    heard(room, facts=theirs, clock=WALL + clock)
    assert room.differences() == words
    assert room.unmet(NOW) == "".join(words)


def test_of_many_differences_one_is_waited_for() -> None:
    room = leader(3)
    heard(room, facts={"tp size": "4", "model": "/other"})
    assert len(room.differences()) == 4
    assert room.unmet(NOW) == "rank 1 (h1): model is /other, on the leader /m (and 3 more)"


# --- the leader: who is let in ----------------------------------------------------------------------------------------


def test_a_rank_is_given_once() -> None:
    room = leader()
    heard(room)
    other = member(1, 1, node="another node", life="its life", host="h9")
    refused = room.hear(other, NOW + DEADLINE, WALL)
    assert refused == Refused("rank 1 is h1 already; give one another --node-rank")
    assert room.twin(1, NOW + DEADLINE) == "h9"
    assert room.ranks[1].since == NOW, "the one that was refused does not keep the rank's place warm"
    assert room.hear(other, NOW + DEADLINE + 0.1, WALL) is None
    assert room.ranks[1].member == other
    assert room.twin(1, NOW + 2 * DEADLINE + 0.1) == "", "it tries no more"


def test_a_new_life_of_the_coordinator_is_let_in_at_once() -> None:
    room = leader()
    heard(room)
    again = member(1, 1, life="the next life")
    assert room.hear(again, NOW, WALL) is None
    assert room.ranks[1].member == again


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"node_rank": 0}, "h1 is rank 0 as well: a group has one leader; give it another --node-rank"),
        ({"node_rank": 2}, "rank 2: --nnodes 2 has ranks 0 to 1"),
        ({"node_rank": -1}, "rank -1: --nnodes 2 has ranks 0 to 1"),
        ({"protocol": PROTOCOL - 1}, None),
        ({"protocol": PROTOCOL - 2}, f"h1 speaks protocol {PROTOCOL - 2}, the leader {PROTOCOL}: upgrade the older of the two"),
        ({"protocol": PROTOCOL + 1}, f"h1 speaks protocol {PROTOCOL + 1}, the leader {PROTOCOL}: upgrade the older of the two"),
    ],
)
def test_who_can_not_belong_here(changes: dict[str, Any], words: str | None) -> None:
    room = leader()
    assert room.hear(member(**changes), NOW, WALL) == (None if words is None else Refused(words))
    assert (room.ranks[1].member is None) == (words is not None)


def test_a_frame_that_was_overtaken_is_ignored() -> None:
    room = leader()
    assert room.hear(member(1, 5, engine="up"), NOW, WALL) is None
    for number in (4, 5):
        assert room.hear(member(1, number, engine="dead"), NOW + 1, WALL) is None
    assert room.ranks[1].member == member(1, 5, engine="up")
    assert room.ranks[1].since == NOW, "and it is no sign of life"


# --- the leader: the end of an epoch ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "after", "words"),
    [
        ({"engine": "dead", "reason": "OOM"}, 0.0, "rank 1 (h1): OOM"),
        ({"engine": "none"}, 0.0, "rank 1 (h1): its engine is gone"),
        ({"engine": "ready"}, DEADLINE + 0.1, "rank 1 (h1): no sign of life for 2 s"),
        ({"engine": "ready"}, DEADLINE, ""),
    ],
)
def test_what_ends_an_epoch(changes: dict[str, Any], after: float, words: str) -> None:
    room = opened()
    heard(room, group="group", epoch=1, **changes)
    assert room.look(NOW + after) == bool(words)
    assert room.reason == words
    assert room.open == (not words)
    assert not room.orderly or not words


def test_the_leaders_own_engine_ends_an_epoch() -> None:
    room = opened()
    room.engine = "dead"
    assert room.look(NOW)
    assert room.reason == "rank 0: its engine is dead"
    assert not room.look(NOW), "said once"


def test_an_engine_that_is_not_started_ends_an_epoch() -> None:
    room = leader()
    heard(room)
    room.start(NOW)
    for now, over in ((NOW + START_SECONDS, False), (NOW + START_SECONDS + 0.1, True)):
        heard(room, now)
        assert room.look(now) == over
    assert room.reason == "rank 1 (h1): its engine was not started within 60 s"


def test_a_node_that_is_started_anew_in_an_open_epoch_ends_it() -> None:
    """Its old engine is gone and the others wait for that one: it must not be started into the same epoch."""
    room = opened()
    assert room.hear(member(1, 1, node="the next node", life="its life"), NOW + DEADLINE + 0.1, WALL) is None
    assert room.look(NOW + DEADLINE + 0.1)


def test_a_leader_that_comes_back_ends_its_epoch_with_a_node_that_has_no_engine_of_it() -> None:
    room = leader(epoch=1, open=True, engine="ready")
    assert room.hear(member(1, 1, node="the next node"), NOW, WALL) is None
    assert room.look(NOW)


def test_a_leader_that_comes_back_goes_on_with_its_epoch() -> None:
    room = leader(epoch=1, open=True, engine="ready")
    assert not room.look(NOW + DEADLINE), "the ranks have until the deadline"
    heard(room, NOW + DEADLINE, group="group", epoch=1, engine="ready")
    assert not room.look(NOW + DEADLINE)
    assert room.frame(NOW + DEADLINE).open
    assert room.look(NOW + 2 * DEADLINE + 0.1)


def test_an_end_that_is_wanted() -> None:
    room = opened()
    room.end("rank 1 (h1) is stopping", orderly=True)
    frame = room.frame(NOW)
    assert (frame.open, frame.orderly, frame.reason) == (False, True, "rank 1 (h1) is stopping")
    room.end("something else")
    assert room.reason == "rank 1 (h1) is stopping", "an epoch ends once"


def test_wish() -> None:
    room = leader(4)
    heard(room)
    assert room.wish(NOW) is None
    for rank, want in ((1, "drain"), (3, "stop")):
        assert room.hear(member(rank, 9, want=want), NOW, WALL) is None
    wishing = room.wish(NOW)
    assert wishing is not None
    assert (wishing[0], wishing[1].want) == (3, "stop"), "a stop goes before a drain"
    assert room.wish(NOW + DEADLINE + 0.1) is None, "who is silent wishes nothing"


# --- a follower -------------------------------------------------------------------------------------------------------


def test_what_a_follower_waits_for() -> None:
    room = follower()
    place = "rank 0 of 4 (the leader, 10.0.0.1:7100) not seen"
    assert room.unmet(NOW + 74) == f"{place}, 74 s"
    room.trouble = "it does not take this node's key"
    assert room.unmet(NOW + 74) == f"{place}, 74 s: it does not take this node's key"
    room.hear(epoch(1, open=False, waiting_for="rank 2 of 4 not seen, 1 s"), NOW + 80)
    assert room.unmet(NOW + 80) == "rank 2 of 4 not seen, 1 s"
    room.hear(epoch(2, open=False), NOW + 80)
    assert room.unmet(NOW + 80) == "the next epoch"
    room.refuse("rank 1 is h9 already")
    assert room.unmet(NOW + 80) == "rank 1 is h9 already"
    room.hear(epoch(3), NOW + 80)
    assert room.unmet(NOW + 80) == ""
    assert room.unmet(NOW + 83) != "", "an old word starts nothing"


def test_a_follower_that_is_refused_forgets_what_it_heard() -> None:
    room = follower()
    room.hear(epoch(7, open=False), NOW)
    assert (room.frame(WALL, "serve").leader, room.frame(WALL, "serve").heard) == ("life", 7)
    room.refuse("no")
    assert (room.frame(WALL, "serve").leader, room.frame(WALL, "serve").heard) == ("", 0)
    assert not room.in_contact(NOW)


def test_a_silence_that_was_announced_ends_nothing() -> None:
    room = follower(engine="up", ran=Started("group", 1))
    room.hear(epoch(1, pause=8.0), NOW)
    assert room.over(NOW + DEADLINE + 8.0) == ""
    assert room.over(NOW + DEADLINE + 8.1) == "the leader at 10.0.0.1:7100: no sign of life for 2 s"
    room.hear(epoch(1, life="the next life"), NOW + 5)
    assert room.over(NOW + 5 + DEADLINE + 0.1) != "", "once"
    leading = opened()
    heard(leading, group="group", epoch=1, engine="up", pause=8.0)
    assert not leading.look(NOW + DEADLINE + 8.0)
    heard(leading, NOW + 5, group="group", epoch=1, engine="up")
    assert leading.look(NOW + 5 + DEADLINE + 0.1)


def test_a_follower_starts_once_in_an_epoch() -> None:
    room = follower()
    room.hear(epoch(1), NOW)
    assert room.start() == Started("group", 1)
    said = room.frame(WALL, "serve")
    assert (said.group, said.epoch, said.engine, said.leader, said.heard) == ("group", 1, "up", "life", 1)
    room.engine = "none"
    assert room.unmet(NOW) == "the end of epoch 1: its engine here is gone"
    room.hear(epoch(2, group="the next group"), NOW)
    assert room.unmet(NOW) == ""


@pytest.mark.parametrize(
    ("said", "after", "words"),
    [
        (epoch(2), 0.0, ""),
        (epoch(2), DEADLINE, ""),
        (epoch(2), DEADLINE + 0.1, "the leader at 10.0.0.1:7100: no sign of life for 2 s"),
        (epoch(2, open=False, reason="rank 2: OOM"), 0.0, "rank 2: OOM"),
        (epoch(2, open=False), 0.0, "the epoch is over"),
        (epoch(2, epoch=2), 0.0, "epoch 1 is over, the leader is at epoch 2"),
        (epoch(2, group="another"), 0.0, "epoch 1 is over, the leader is at epoch 1"),
        (Refused("no"), 0.0, "no"),
        (None, DEADLINE, ""),
        (None, DEADLINE + 0.1, "the leader at 10.0.0.1:7100: no sign of life for 2 s"),
    ],
)
def test_what_ends_a_followers_engine(said: FromLeader | None, after: float, words: str) -> None:
    """Also of one whose coordinator has just come back: it has heard nothing before ``said``."""
    room = follower(engine="up", ran=Started("group", 1))
    if isinstance(said, Epoch):
        room.hear(said, NOW)
    elif said is not None:
        room.refuse(said.reason)
    assert room.over(NOW + after) == words
    room.engine = "none"
    assert room.over(NOW + after) == "", "there is nothing to end"


def test_an_end_that_was_wanted_is_orderly() -> None:
    room = follower(engine="up", ran=Started("group", 1))
    room.hear(epoch(1), NOW)
    assert not room.orderly
    room.hear(epoch(2, open=False, orderly=False), NOW)
    assert not room.orderly
    room.hear(epoch(3, open=False, orderly=True), NOW)
    assert room.orderly


def test_a_leaders_frame_that_was_overtaken_is_ignored() -> None:
    room = follower()
    room.hear(epoch(5, open=False), NOW)
    for number in (4, 5):
        room.hear(epoch(number), NOW + 1)
    assert room.said == epoch(5, open=False)
    assert not room.in_contact(NOW + DEADLINE + 0.1), "and it is no sign of life"
    room.hear(epoch(1, life="the next life"), NOW + 3)
    assert room.said == epoch(1, life="the next life")


# --- the key ----------------------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[NodeError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_a_key_is_made_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key.make(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
    made = key.load(str(path))
    assert made is not None
    assert [len(part) for part in made] == [40, 40]
    assert made[0] != made[1]
    other = tmp_path / "other"
    key.make(other)
    assert key.load(str(other)) != made


def test_no_key() -> None:
    assert key.load(None) is None


def test_a_key_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key.make(path)
    was = path.read_bytes()
    with pytest.raises(NodeError) as error:
        key.make(path)
    one_line(error, str(path), "exists")
    assert path.read_bytes() == was
    with pytest.raises(NodeError) as error:
        key.make(tmp_path / "nowhere" / "key")
    one_line(error, str(tmp_path / "nowhere" / "key"), "No such file")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    key.make(path)
    path.chmod(mode)
    with pytest.raises(NodeError) as error:
        key.load(str(path))
    one_line(error, "--group-key-file", f"chmod 600 {path}")


PUBLIC_ONLY = 'metadata\ncurve\n    public-key = "' + "x" * 40 + '"\n'


@pytest.mark.parametrize(
    "text", [b"", b"hello\n", b"\xff\xfe\x00", PUBLIC_ONLY.encode(), PUBLIC_ONLY.replace("x" * 40, "x").encode()]
)
def test_garbage_is_no_key(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.raises(NodeError) as error:
        key.load(str(path))
    one_line(error, "--group-key-file", str(path), "not a group's key")


def test_a_key_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NodeError) as error:
        key.load(str(tmp_path / "key"))
    one_line(error, "--group-key-file", "No such file")


# --- the link, on loopback --------------------------------------------------------------------------------------------


class Ends:
    """A leader's end that refuses rank 3, and a follower's; what each of them heard. A context for each, as each is a process."""

    def __init__(self) -> None:
        self.port = dist_port()
        self.members: list[Member] = []
        self.said: list[FromLeader] = []
        self.troubles: list[str] = []
        self.leading: LeaderLink | None = None
        self.following: FollowerLink | None = None
        self.contexts: dict[object, zmq.Context[zmq.Socket[bytes]]] = {}

    def hear(self, one: Member) -> Refused | None:
        self.members.append(one)
        return Refused("no rank 3") if one.node_rank == 3 else None

    def lead(self, secret: Key | None) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.leading = LeaderLink(context, f"tcp://127.0.0.1:{self.port}", secret, DEADLINE, self.hear)
        self.contexts[self.leading] = context

    def follow(self, secret: Key | None) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        place = ("127.0.0.1", self.port)
        self.following = FollowerLink(context, place, secret, DEADLINE, self.said.append, self.troubles.append)
        self.contexts[self.following] = context

    def end(self, link: LeaderLink | FollowerLink | None) -> None:
        if link is not None:
            link.close()
            self.contexts.pop(link).term()

    def end_leader(self) -> None:
        self.end(self.leading)
        self.leading = None

    def say(self, one: Member | None = None, back: Epoch | None = None) -> None:
        assert self.following is not None
        self.following.say(one or member())
        if back is not None and self.leading is not None:
            self.leading.say(back)


@contextmanager
def both_ends() -> Iterator[Ends]:
    made = Ends()
    try:
        yield made
    finally:
        made.end(made.following)
        made.end(made.leading)


async def until(met: Callable[[], object], do: Callable[[], object] = lambda: None, seconds: float = 8.0) -> None:
    """Do it again and again until the condition is met."""
    async with asyncio.timeout(seconds):
        while not met():
            do()
            await asyncio.sleep(0.02)


def new_key(directory: Path, name: str) -> Key:
    key.make(directory / name)
    made = key.load(str(directory / name))
    assert made is not None
    return made


@pytest.mark.parametrize("closed", [True, False])
def test_both_ends_talk(tmp_path: Path, closed: bool) -> None:
    async def scenario() -> None:
        secret = new_key(tmp_path, "key") if closed else None
        with both_ends() as ends:
            ends.lead(secret)
            ends.follow(secret)
            await until(lambda: ends.members, ends.say)
            assert ends.members[0] == member()
            await until(lambda: ends.said, lambda: ends.say(back=epoch()))
            assert ends.said[0] == epoch()
            assert ends.troubles == [""]

    asyncio.run(scenario())


def test_who_is_refused_hears_why_and_nothing_else() -> None:
    async def scenario() -> None:
        with both_ends() as ends:
            ends.lead(None)
            ends.follow(None)
            await until(lambda: len(ends.said) >= 3, lambda: ends.say(member(3), back=epoch()))
            assert set(map(str, ends.said)) == {str(Refused("no rank 3"))}

    asyncio.run(scenario())


@pytest.mark.parametrize("theirs", ["wrong", "none"])
def test_without_the_key_nobody_is_heard(tmp_path: Path, caplog: pytest.LogCaptureFixture, theirs: str) -> None:
    """The leader logs it once, a follower is told each time it has tried."""

    async def scenario() -> None:
        with both_ends() as ends:
            ends.lead(new_key(tmp_path, "right"))
            ends.follow(new_key(tmp_path, "wrong") if theirs == "wrong" else None)
            await until(lambda: len(ends.troubles) >= 2, ends.say)
            assert not ends.members
            assert set(ends.troubles) == {"it does not take this node's key: is --group-key-file the same there?"}

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["a node that has not the group's key was refused: is --group-key-file the same on every node?"]


def test_a_leader_without_a_key_does_not_hear_who_has_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        with both_ends() as ends:
            ends.lead(None)
            ends.follow(new_key(tmp_path, "key"))
            await until(lambda: len(ends.troubles) >= 2, ends.say)
            assert not ends.members
            assert set(ends.troubles) == {"it does not take this node's key: is --group-key-file the same there?"}

    asyncio.run(scenario())


@pytest.mark.parametrize("before", ["wrong", "none", "absent"])
def test_a_leader_that_is_started_again_with_the_key_is_found(tmp_path: Path, before: str) -> None:
    async def scenario() -> None:
        right = new_key(tmp_path, "right")
        with both_ends() as ends:
            if before != "absent":
                ends.lead(new_key(tmp_path, "wrong") if before == "wrong" else None)
            ends.follow(right)
            if before != "absent":
                await until(lambda: ends.troubles, ends.say)
                assert ends.troubles[0]
                ends.end_leader()
            await asyncio.sleep(0.3)
            assert not ends.members
            ends.lead(right)
            await until(lambda: ends.members, ends.say)
            assert ends.troubles[-1] == ""

    asyncio.run(scenario())


def test_a_follower_finds_the_next_life_of_its_leader() -> None:
    async def scenario() -> None:
        with both_ends() as ends:
            ends.lead(None)
            ends.follow(None)
            await until(lambda: ends.said, lambda: ends.say(back=epoch()))
            ends.end_leader()
            ends.said.clear()
            ends.lead(None)
            await until(lambda: ends.said, lambda: ends.say(back=epoch(1, life="second")), 2.0)
            assert ends.said[0] == epoch(1, life="second")

    asyncio.run(scenario())
