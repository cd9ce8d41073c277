"""Role ``mm_prefill``: computes prompts with embeddings in them for a decode worker that asks it (dynamo.sglang 1.6.1)."""

from shared.roles import mm_wire, prefill
from shared.roles.decode import HEALTH_CHECK, canary, canary_request
from shared.roles.role import Asked, Chunk, Payload, Role


def to_engine(asked: Asked) -> list[Payload]:
    """Raises RequestError(INVALID)."""
    mm_wire.unwrap(asked)
    return [{**payload, **mm_wire.arguments(asked)} for payload in prefill.to_engine(asked)]


def opening(asked: Asked, payload: Payload) -> Chunk | None:
    """Where decode finds the cache."""
    return None if asked.request.get(HEALTH_CHECK) else asked.kept["bootstrap"]


MM_PREFILL = Role(
    name="mm_prefill",
    worker_type="Prefill",
    needs=(("Decode",),),
    model_input="Tokens",
    model_type="Empty",
    to_engine=to_engine,
    to_dynamo=prefill.to_dynamo,
    canary=canary,
    canary_request=canary_request,
    opening=opening,
)
