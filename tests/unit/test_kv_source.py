"""SGLang's frames over real sockets, played with holes: all in order with a replay socket, the loss known without one."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
import zmq

from procs.relay.kv import source as module
from procs.relay.kv.source import Source
from tests.kv_player import CLEARED, Player


class Listener:
    def __init__(self, player: Player, *, replay: bool) -> None:
        self.player = player
        self.heard: list[int] = []
        self.losses = 0
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.source = Source(self.context, player.events, player.replay if replay else None, self.take, self.lose)

    def take(self, payload: bytes) -> None:
        (_, (number,), _) = msgspec.msgpack.decode(payload)
        self.heard.append(number)

    def lose(self) -> None:
        self.losses += 1

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def connected(self) -> None:
        """Frames are no more lost because the subscription is young: this one comes in again and again, as a duplicate."""
        payload = msgspec.msgpack.encode([0.0, [0], 0])

        async def knock() -> None:
            while True:
                self.player.raw(b"", (0).to_bytes(8, "big"), payload)
                await asyncio.sleep(0.01)

        task = asyncio.create_task(knock())
        await self.until(lambda: 0 in self.heard)
        task.cancel()

    def close(self) -> None:
        self.source.close()
        self.context.destroy(linger=0)


def run(test: Callable[[Player, Callable[..., Listener]], Awaitable[None]], **more: Any) -> None:
    async def main() -> None:
        listeners: list[Listener] = []

        def listen(*, replay: bool) -> Listener:
            listeners.append(Listener(player, replay=replay))
            return listeners[-1]

        with Player(**more) as player:
            try:
                await test(player, listen)
            finally:
                for listener in listeners:
                    listener.close()

    asyncio.run(main())


@pytest.mark.parametrize("topics", [True, False])
def test_a_late_listener_gets_everything_from_the_first_frame_on(topics: bool) -> None:
    async def test(player: Player, listen: Callable[..., Listener]) -> None:
        for number in range(2000):
            player.say(number)
        listener = listen(replay=True)
        await listener.until(lambda: len(listener.heard) == 2000)
        player.say(2000)  # may be lost on a young subscription: it is asked for again by itself
        await listener.until(lambda: len(listener.heard) == 2001)
        assert listener.heard == list(range(2001))
        assert (listener.source.lost, listener.losses, listener.source.malformed) == (0, 0, 0)

    run(test, topics=topics)


def test_a_hole_is_filled_and_what_comes_meanwhile_waits() -> None:
    async def test(player: Player, listen: Callable[..., Listener]) -> None:
        listener = listen(replay=True)
        player.say(0)
        await listener.connected()
        for number in range(1, 50):
            player.say(number, heard=number not in (3, 4, 20))
        await listener.until(lambda: len(listener.heard) == 50)
        assert listener.heard == list(range(50))
        assert listener.source.gaps >= 1 and listener.source.lost == 0 and listener.losses == 0
        assert 3 <= listener.source.replayed < 50

    run(test)


def test_without_a_replay_socket_a_loss_is_counted_and_said() -> None:
    async def test(player: Player, listen: Callable[..., Listener]) -> None:
        listener = listen(replay=False)
        player.say(0)
        await listener.connected()
        for number in range(1, 10):
            player.say(number, heard=number not in (3, 4, 7))
        await listener.until(lambda: 9 in listener.heard)
        assert listener.heard == [0, 1, 2, 5, 6, 8, 9]
        assert (listener.source.gaps, listener.source.lost, listener.losses) == (2, 3, 2)
        assert player.asked == []

    run(test)


def test_without_a_replay_socket_a_late_listener_knows_that_it_is_late() -> None:
    async def test(player: Player, listen: Callable[..., Listener]) -> None:
        for number in range(5):
            player.say(number)
        listener = listen(replay=False)
        number = 5
        while not listener.heard:
            player.say(number)
            number += 1
            await asyncio.sleep(0.02)
        assert listener.source.lost == listener.heard[0] >= 5 and listener.losses == 1

    run(test)


def test_what_sglang_keeps_no_longer_is_lost_and_the_rest_is_taken() -> None:
    async def test(player: Player, listen: Callable[..., Listener]) -> None:
        for number in range(100):
            player.say(number)
        listener = listen(replay=True)
        await listener.until(lambda: 99 in listener.heard)
        assert listener.heard == list(range(60, 100))
        assert (listener.source.lost, listener.losses) == (60, 1)

    run(test, buffer=40)


def test_an_answer_that_stops_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(module, "LOOK_SECONDS", 60.0)

    async def test(player: Player, listen: Callable[..., Listener]) -> None:
        player.cut = 10
        for number in range(25):
            player.say(number)
        listener = listen(replay=True)
        await listener.until(lambda: len(listener.heard) == 25)
        assert listener.heard == list(range(25))
        assert player.asked == [0, 10, 20] and listener.source.lost == 0

    run(test)


def test_a_lost_frame_with_none_after_it_is_asked_for_after_a_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.1)

    async def test(player: Player, listen: Callable[..., Listener]) -> None:
        listener = listen(replay=True)
        player.say(0)
        await listener.connected()
        player.say(1)
        player.say(2, heard=False)
        await listener.until(lambda: 2 in listener.heard)
        player.say(3, heard=False)
        await listener.until(lambda: 3 in listener.heard)
        assert listener.heard == [0, 1, 2, 3] and listener.source.replayed >= 2

    run(test)


def test_while_frames_come_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)

    async def test(player: Player, listen: Callable[..., Listener]) -> None:
        listener = listen(replay=True)
        player.say(0)
        await listener.connected()
        asked, began = len(player.asked), time.monotonic()
        for number in range(1, 200):
            player.say(number)
            await asyncio.sleep(0.001)
        await listener.until(lambda: 199 in listener.heard)
        looks = (time.monotonic() - began) / module.LOOK_SECONDS
        assert len(player.asked) - asked < looks / 2, "a busy host may hold us up now and then"

    run(test)


def test_a_dead_replay_socket_loses_only_what_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.1)

    async def test(player: Player, listen: Callable[..., Listener]) -> None:
        player.cut = 0
        listener = listen(replay=True)
        player.say(0)
        await listener.connected()
        player.say(1, heard=False)
        player.say(2)
        await listener.until(lambda: 2 in listener.heard)
        assert listener.heard == [0, 2] and listener.source.lost == 1

    run(test)


def test_frames_of_another_shape_are_counted() -> None:
    async def test(player: Player, listen: Callable[..., Listener]) -> None:
        listener = listen(replay=False)
        player.say(0)
        await listener.connected()
        player.raw(b"two", b"parts")
        player.raw(b"", b"short", msgspec.msgpack.encode([0.0, [CLEARED], 0]))
        player.say(1)
        await listener.until(lambda: 1 in listener.heard)
        assert listener.source.malformed == 2 and listener.heard == [0, 1]

    run(test)
