"""Which canaries an engine gets: the role's own, or the operator's (--health-check-payload), one for each DP rank."""

from typing import Any

from shared.frames import EngineFacts
from shared.roles import diffusion
from shared.roles.decode import HEALTH_CHECK
from shared.roles.role import Asked, Payload, Request, Role


def ranks(role: Role, facts: EngineFacts) -> list[int | None]:
    """None: wherever SGLang puts it. In SGLang 0.5.23 a request for an embedding can't choose its rank (EmbeddingReqInput)."""
    if facts.dp_size == 1 or not role.generates:
        return [None]
    return list(range(facts.dp_start, facts.dp_start + facts.dp_size))


def request(role: Role, facts: EngineFacts, given: dict[str, Any] | None) -> Request:
    """As a Dynamo request. Of the role's own its mark stays, and the bootstrap address where the given one has none."""
    own = role.canary_request(facts)
    if given is None:
        return own
    kept = {name: own[name] for name in ("bootstrap_info",) if name in own}
    return {**kept, **given, **{name: own[name] for name in (HEALTH_CHECK,) if name in own}}


def payload(role: Role, facts: EngineFacts, given: dict[str, Any] | None, rank: int | None) -> Payload:
    """As the engine takes it. Raises RequestError for a given one that the role can't take."""
    made = role.canary(facts) if given is None else role.to_engine(Asked(request(role, facts, given), facts))[0]
    if role.generates:
        made = {**made, "detokenize": True}  # the long way: what isn't direct needs it as well
    elif role.engine == diffusion.ENGINE:
        made = {**made, "canary": True}  # it asks whether the engine works, not for room in its queue
    if rank is None:
        return made
    # A bootstrap room belongs to a rank as well (dynamo.sglang 1.6.1, warmup_prefill_engine).
    room = {"bootstrap_room": rank} if "bootstrap_room" in made else {}
    return {**made, **room, "routed_dp_rank": rank}
