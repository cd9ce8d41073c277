"""What the tests of every role start from: an engine's facts, a request in token form, and its translation."""

from typing import Any

from shared.frames import EngineFacts, Output
from shared.roles.role import Asked, Role

FACTS = EngineFacts(
    "aggregated", "x", "0", "/m", "m", 100, 4096, 16, 10, 4, 100, 0, 1, 1, [2], 0.1,
    bootstrap_host="192.0.2.1", bootstrap_port=8998, fake_bootstrap_host="2.2.2.2",
)  # fmt: skip
BOOTSTRAP = {"bootstrap_host": "192.0.2.7", "bootstrap_port": 9000, "bootstrap_room": 77}


def asked(facts: EngineFacts = FACTS, trace: dict[str, str] | None = None, **fields: Any) -> Asked:
    """A token request with these fields."""
    return Asked({"token_ids": [5, 6], **fields}, facts, "ctx", trace)


def plain(facts: EngineFacts = FACTS, **fields: Any) -> Asked:
    """A request of these fields alone."""
    return Asked(fields, facts, "ctx", None)


def only(role: Role, found: Asked) -> dict[str, Any]:
    """The one payload of the request."""
    (payload,) = role.to_engine(found)
    return payload


def said(role: Role, output: Output, index: int, found: Asked) -> Any:
    """The chunk of an output; there is one."""
    chunk = role.to_dynamo(output, index, found)
    assert chunk is not None
    return chunk
