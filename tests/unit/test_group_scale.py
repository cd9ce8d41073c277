"""Many coordinators' group rooms on real sockets: they agree on one epoch after every kill, and never have engines of two."""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest

from tests.conftest import SOAK
from tests.group_rooms import DEADLINE, Room, Watch
from tests.groups import dist_port

LIMIT_SECONDS = 30.0
"""To agree, on cores that others use as well."""
KINDS = ["engine"] * 14 + ["coordinator"] * 4 + ["coordinator restarted", "node"]
"""What is killed, as often as it is here: a node's end costs the deadline."""


class Rooms:
    def __init__(self, nnodes: int, directory: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.watch = Watch()
        port = dist_port()
        self.rooms = [Room(rank, nnodes, port, directory, self.watch) for rank in range(nnodes)]
        self.agreed: list[float] = []
        """Seconds from the last event that was needed to every engine ready in one epoch."""

    @property
    def leader(self) -> Room:
        return self.rooms[0]

    def whole(self) -> bool:
        epochs = {room.runs() for room in self.rooms}
        return len(epochs) == 1 and None not in epochs and all(room.is_open() for room in self.rooms)

    async def until(self, met: Callable[[], bool], what: str) -> None:
        began = time.monotonic()
        while not met():
            assert not self.watch.wrong, self.watch.wrong
            assert time.monotonic() - began < LIMIT_SECONDS, what
            self.watch.changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    await self.watch.changed.wait()

    async def start(self) -> None:
        for room in self.random.sample(self.rooms, len(self.rooms)):
            room.start_node()
            await asyncio.sleep(self.random.uniform(0, 0.005))
        began = time.monotonic()
        await self.until(self.whole, "no first epoch")
        self.agreed.append(time.monotonic() - began)

    async def kill(self, count: int) -> None:
        """``count`` ranks at once. A dead coordinator is back within a part of the deadline."""
        before, at = self.leader.runs(), time.monotonic()
        killed = [(self.random.choice(KINDS), room) for room in self.random.sample(self.rooms, count)]
        needed = at
        for kind, room in killed:
            pause = self.random.uniform(0, 0.3)
            if kind == "engine":
                room.kill_engine()
                continue
            {"coordinator": room.kill_coordinator, "node": room.kill_node}.get(kind, room.stop_coordinator)()
            again = room.start_node if kind == "node" else room.start_coordinator
            asyncio.get_running_loop().call_later(pause, again)
            needed = max(needed, at + (DEADLINE if kind == "node" and room.rank else pause))
        kinds = {kind for kind, _ in killed}
        if kinds <= {"coordinator", "coordinator restarted"}:
            await self.until(lambda: self.in_contact(at), f"no contact with {[room.rank for _, room in killed]}")
            assert self.whole(), "a coordinator's death has cost an epoch"
            assert self.leader.runs() == before
            return
        await self.until(
            lambda: self.whole() and self.leader.runs() != before,
            f"no epoch after {kinds} of {[room.rank for _, room in killed]}",
        )
        self.agreed.append(time.monotonic() - max(needed, self.watch.gone_at))

    def in_contact(self, since: float) -> bool:
        """The leader has heard every rank again, and each of them knows the epoch."""
        heard = max(self.leader.last_heard(), default=float("inf"))
        return time.monotonic() - heard - 0.1 > since and all(room.is_open() for room in self.rooms)


@pytest.mark.parametrize(("nnodes", "kills"), [(4, 1600 if SOAK else 160), (64, 200 if SOAK else 40)])
def test_a_group_agrees_after_every_kill(nnodes: int, kills: int, tmp_path: Path, figures: Callable[..., None]) -> None:
    async def scenario() -> Rooms:
        rooms = Rooms(nnodes, tmp_path, seed=nnodes)
        try:
            await rooms.start()
            left = kills
            while left:
                count = min(left, rooms.random.choice([1, 1, 1, 2, 3]))
                await rooms.kill(count)
                left -= count
        finally:
            for room in rooms.rooms:
                room.kill_node()
        return rooms

    rooms = asyncio.run(scenario())
    assert not rooms.watch.wrong, rooms.watch.wrong
    figures(nnodes=nnodes, kills=kills, agree_ms=median(rooms.agreed) * 1e3, agree_most_ms=max(rooms.agreed) * 1e3)
