"""One request of the recorded set: what is sent, and how its two answers are compared."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

Compare = Literal["exact", "shape", "status"]
"""``exact``: everything. ``shape``: all but the generated text and its logprobs, for answers that are drawn at random.
``status``: the status code only."""


@dataclass(frozen=True)
class Case:
    """A request. ``body`` as text is sent as it is (malformed JSON); None is a GET."""

    name: str
    """Unique in the set: ``topic/what``."""
    path: str
    body: dict[str, Any] | str | None
    compare: Compare = "exact"
    cached: bool = False
    """Both answers must report cached tokens: the request repeats a prompt."""
    headers: dict[str, str] = field(default_factory=dict)
    wanted: int | None = None
    """Status that sgnode must answer (an error in a stream counts), whatever the incumbent did.

    Its engine dies of this request, or has died of one before.
    """
    alone: str = ""
    """Sent to sgnode only, with ``wanted``: why the incumbent doesn't get it."""

    @property
    def stream(self) -> bool:
        return isinstance(self.body, dict) and self.body.get("stream") is True

    @property
    def digest(self) -> str:
        """Of what is sent: a recording of another request is worth nothing."""
        sent = json.dumps([self.path, self.body, self.headers], sort_keys=True)
        return hashlib.sha256(sent.encode()).hexdigest()[:16]
