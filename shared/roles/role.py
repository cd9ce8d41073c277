"""What a role is: how one worker type talks to its engine and to Dynamo, as plain functions on plain data."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shared.frames import EngineFacts, Output

Payload = dict[str, Any]
"""What the engine's process needs for one request, plain data. ``call`` says what for, ``generate`` if absent:

``generate``: the rest are keyword arguments of SGLang's ``Engine.async_generate``; ``asks`` holds fields of Dynamo's request
that only SGLang's process can judge (procs.engine.adapter.asks). ``text``: the same with a ``request`` in OpenAI's form, whose
prompt is rendered there, and text as output. ``native``: SGLang's own GenerateReqInput. ``embed``: SGLang's EmbeddingReqInput.
``media`` and ``blobs``: the kinds and the contents of a ``generate``'s media (shared.roles.media); ``encoded``: what another
engine has made of them (shared.roles.mm_wire). ``encode``: media become embeddings for another engine; that engine has to fetch
them while the request lasts.
``diffuse``: an image or a video; ``params`` are SGLang's sampling parameters, a blob the picture to start from, ``canary``: the
queue's bound does not hold for it.
``detokenize``: a ``generate`` that goes through SGLang's detokenizer, as those with text do; ids need it not.
"""
Request = dict[str, Any]
"""A request as Dynamo 1.6.1 hands it to a worker."""
Chunk = Any
"""A reply chunk as Dynamo 1.6.1 takes it from a worker: a dict, a list for rerank."""

CONTROL_ENDPOINTS = ("load_lora", "unload_lora", "list_loras", "clear_kv_blocks")
"""A generating worker's endpoints beside its own, in Dynamo 1.6.1."""


@dataclass(slots=True)
class Media:
    """One request's media. ``kinds[i]`` (image, video, audio) is what ``blobs[i]`` holds: the file as it is, not decoded."""

    kinds: list[str]
    blobs: list[bytes]
    held: int = 0
    """Bytes that count against the agent's bound (procs.agent.media)."""
    decoded: list[int] = field(default_factory=list)
    """Which of ``blobs`` say where an image's pixels are instead (shared.roles.decoded)."""


@dataclass(slots=True)
class Asked:
    """One request with what its translation depends on."""

    request: Request
    facts: EngineFacts
    context_id: str = ""
    trace: dict[str, str] | None = None
    """Trace headers for the engine, when it traces."""
    media: Media | None = None
    """What its references stand for, fetched."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What ``to_engine`` leaves for ``to_dynamo``."""


def _nothing(asked: Asked, payload: Payload) -> Chunk | None:
    return None


@dataclass(frozen=True)
class Callee:
    """Another worker that takes part in each request of a role: a component of the same namespace, its ``generate`` endpoint."""

    component: str
    request: Callable[[Asked], Request | str | None]
    """What it is asked; None: nothing, this request needs it not. Raises RequestError."""
    take: Callable[[Chunk, Asked], Chunk | None]
    """What a chunk of its answer becomes for the client. Raises RequestError for one that says that it failed."""
    first: bool = False
    """It is asked before the engine, and its first chunk says how to go on; otherwise it answers in the engine's place."""


@dataclass(frozen=True)
class Role:
    """One worker type. Names of Dynamo's enum members are strings here: only the agent imports dynamo's runtime."""

    name: str
    worker_type: str
    """Member of dynamo.llm.WorkerType."""
    needs: tuple[tuple[str, ...], ...]
    """Peer roles needed to serve, any of the inner tuples (DNF)."""
    model_input: str
    """Member of dynamo.llm.ModelInput."""
    model_type: str
    """Member of dynamo.llm.ModelType; empty: what --endpoint-types says."""
    to_engine: Callable[[Asked], list[Payload]]
    """A Dynamo request as engine payloads, one a sample (``n``). Raises RequestError for a bad request."""
    to_dynamo: Callable[[Output, int, Asked], Chunk | None]
    """An engine output of sample ``index`` as a Dynamo chunk; None when there is nothing to say. May raise RequestError."""
    canary: Callable[[EngineFacts], Payload]
    """The smallest real request that proves the whole engine path works."""
    canary_request: Callable[[EngineFacts], Request]
    """The same as a Dynamo request, for Dynamo's own health check of the endpoint (DYN_HEALTH_CHECK_ENABLED)."""
    opening: Callable[[Asked, Payload], Chunk | None] = _nothing
    """A chunk that leaves as soon as the request is submitted, before the engine has said anything."""
    engine: str = "generate"
    """What its engine's process builds: ``generate``; ``encode`` for a vision tower alone, ``diffuse`` for images and videos."""
    callee: Callee | None = None
    takes_media: bool = False
    """Images, videos and audio of a request are fetched for it, where its model takes them."""
    generates: bool = True
    """Tokens come out: it has the endpoints for adapters and for the KV cache, and the engine-native generate."""
