"""What a role is: how one worker type talks to its engine and to Dynamo, as plain functions on plain data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shared.frames import EngineFacts, Output

Payload = dict[str, Any]
"""Keyword arguments of the engine's submit (SGLang's ``Engine.async_generate``), plain data."""
Request = dict[str, Any]
"""A request as Dynamo 1.6.1 hands it to a worker."""
Chunk = dict[str, Any]
"""A reply chunk as Dynamo 1.6.1 takes it from a worker."""


@dataclass(frozen=True)
class Role:
    """One worker type. Names of Dynamo's enum members are strings here: only the agent imports dynamo."""

    name: str
    component: str
    """Default component of the endpoint: ``dyn://<namespace>.<component>.generate``."""
    worker_type: str
    """Member of dynamo.llm.WorkerType."""
    needs: tuple[tuple[str, ...], ...]
    """Peer roles needed to serve, any of the inner tuples (DNF)."""
    model_input: str
    """Member of dynamo.llm.ModelInput."""
    to_engine: Callable[[Request, EngineFacts], list[Payload]]
    """A Dynamo request as engine payloads, one a sample (``n``). Raises RequestError for a bad request."""
    to_dynamo: Callable[[Output, int, Request], Chunk]
    """An engine output of sample ``index`` as a Dynamo chunk."""
    canary: Callable[[EngineFacts], Payload]
    """The smallest real request that proves the whole engine path works."""
    canary_request: Callable[[EngineFacts], Request]
    """The same as a Dynamo request, for Dynamo's own health check of the endpoint (DYN_HEALTH_CHECK_ENABLED)."""
