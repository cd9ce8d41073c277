"""Where an engine's KV events are: JSON in its Beat's ``info["kv_events"]``, from the engine to the relay."""

import msgspec

INFO = "kv_events"


class KvSource(msgspec.Struct, frozen=True):
    """ZMQ addresses to connect to: SGLang's PUB, and its replay ROUTER if it has one (``replay_endpoint``)."""

    events: str
    replay: str | None = None


class KvSources(msgspec.Struct, frozen=True):
    """``block_size`` in tokens; ``ranks``: the DP ranks whose caches are on this node."""

    block_size: int
    ranks: dict[int, KvSource]


def say(sources: KvSources) -> dict[str, str]:
    """The entry of Beat.info."""
    return {INFO: msgspec.json.encode(sources).decode()}


def said(info: dict[str, str]) -> KvSources | None:
    """What a Beat says; None when it says nothing, or nothing that can be read."""
    try:
        return msgspec.json.decode(info[INFO], type=KvSources)
    except (KeyError, msgspec.MsgspecError):
        return None
