"""One DP rank's frames from SGLang, in order and without a hole where that is possible: a SUB and its replay ROUTER.

Frames are counted from 0 in each life of an engine (sglang 0.5.23, ZmqEventPublisher). SGLang keeps the last
``buffer_steps`` for replay, and sends them on request: 8 bytes, the first one wanted; the end has the number -1.
"""

import asyncio
import logging
from collections.abc import Callable

import zmq

from shared.sockets import LoopSocket

END = b"\xff" * 8
ANSWER_SECONDS = 5.0
"""For the first word of an answer: SGLang looks at its replay socket ten times a second."""
SILENCE_SECONDS = 0.5
"""Between two frames of an answer: it is sent in one go. SGLang's ROUTER drops what a line can't take at once, the end too."""
LOOK_SECONDS = 1.0
"""Silent for so long, SGLang is asked: the last frame before a silence may be the lost one, which no later one gives away.
It also brings what was said after the first answer and before the subscription reached SGLang."""
AHEAD_FRAMES = 50_000
"""Frames kept while those before them are asked for; five times SGLang's own buffer."""
MAX_BYTES = 64 << 20
"""One frame: a step that stores a million tokens is 5 MB."""


class Source:
    """Gives each frame's payload to ``take``, in order. Runs from its making to close().

    ``frames`` taken, ``gaps`` seen in the sequence, ``replayed`` frames that only an answer brought, ``lost`` frames that nobody
    has any more; ``on_loss`` is called then.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        events: str,
        replay: str | None,
        take: Callable[[bytes], None],
        on_loss: Callable[[], None],
    ) -> None:
        self._context = context
        self._events = events
        self._replay = replay
        self._take = take
        self._on_loss = on_loss
        self._next = 0
        self._ahead: dict[int, bytes] = {}
        self.frames = self.gaps = self.replayed = self.lost = self.malformed = 0
        sock = context.socket(zmq.SUB)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.RCVHWM, 0)  # dropping would be a gap: what a busy relay can't take yet waits here
        sock.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
        sock.setsockopt(zmq.RECONNECT_IVL, 20)
        sock.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
        sock.setsockopt(zmq.SUBSCRIBE, b"")
        sock.connect(events)
        self._live = LoopSocket(sock, self._heard)
        self._asking: LoopSocket | None = None
        self._asked = 0
        self._timer: asyncio.TimerHandle | None = None
        self._silent = True
        self._look: asyncio.TimerHandle | None = None
        if replay is not None:
            self._ask()  # what was said before this relay listened
            self._look = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look_again)

    @property
    def replays(self) -> bool:
        """SGLang can be asked for frames again."""
        return self._replay is not None

    def close(self) -> None:
        self._live.close()
        self._end_asking()
        if self._look is not None:
            self._look.cancel()

    def _heard(self, parts: list[bytes]) -> None:
        self._silent = False
        if len(parts) != 3 or len(parts[1]) != 8:
            self.malformed += 1
            return
        self._offer(int.from_bytes(parts[1], "big"), parts[2])
        if self._ahead and self._asking is None:
            self.gaps += 1
            self._ask() if self._replay is not None else self._give_up()
        elif len(self._ahead) > AHEAD_FRAMES:
            self._give_up()

    def _offer(self, number: int, payload: bytes) -> None:
        if number >= self._next:
            self._ahead[number] = payload
        self._advance()

    def _advance(self) -> None:
        while (payload := self._ahead.pop(self._next, None)) is not None:
            self._next += 1
            self.frames += 1
            self._take(payload)

    def _give_up(self) -> None:
        """Nobody has what is missing before the first frame that came: go on there."""
        first = min(self._ahead)
        self.lost += first - self._next
        logging.warning("KV events at %s: %d frames are lost", self._events, first - self._next)
        self._next = first
        self._on_loss()
        self._advance()

    # --- replay ---

    def _ask(self) -> None:
        assert self._replay is not None
        sock = self._context.socket(zmq.DEALER)  # another one each time: nothing of an earlier answer comes late
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.RCVHWM, 0)
        sock.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
        sock.connect(self._replay)
        self._asking, self._asked = LoopSocket(sock, self._answered), self._next
        self._asking.send([b"", self._next.to_bytes(8, "big")])
        self._wait(ANSWER_SECONDS)

    def _look_again(self) -> None:
        if self._silent and self._asking is None:
            self._ask()
        self._silent = True
        self._look = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look_again)

    def _wait(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._over, False)

    def _answered(self, parts: list[bytes]) -> None:
        # After the empty part: topic, number, payload; number and payload alone up to SGLang 0.5.16.
        if len(parts) not in (3, 4) or len(parts[-2]) != 8:
            self.malformed += 1
        elif parts[-2] == END:
            self._over(True)
        else:
            self._wait(SILENCE_SECONDS)
            number = int.from_bytes(parts[-2], "big")
            self.replayed += number >= self._next and number not in self._ahead
            self._offer(number, parts[-1])

    def _over(self, whole: bool) -> None:
        """The answer has ended, or stopped coming: ask for what is missing while that brings anything."""
        self._end_asking()
        while self._ahead or not whole:
            if self._next > self._asked:
                self._ask()
                return
            if not self._ahead:
                return
            self._give_up()

    def _end_asking(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._asking is not None:
            self._asking.close()
            self._asking = None
