"""What is wanted of the node: serve, drain or stop, and how patiently. Kept in supervisord: no other death loses it."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

SERVE, DRAIN, STOP = "serve", "drain", "stop"


@dataclass
class Wants:
    """``hurry``: running streams end now, with the error that a frontend continues elsewhere. ``since`` in UNIX seconds."""

    want: str = SERVE
    reason: str = ""
    since: float = field(default_factory=time.time)
    hurry: bool = False
    restarts: int = 0
    """How many restarts of the engine persons have asked for (a group's engines restart together)."""

    def change(self, want: str, reason: str) -> bool:
        """Take a new wish; True when it is another one. A stop is never taken back."""
        if self.want in (want, STOP):
            return False
        self.want, self.reason, self.since, self.hurry = want, reason, time.time(), False
        return True

    def plain(self) -> dict[str, Any]:
        """As XML-RPC carries it."""
        return asdict(self)
