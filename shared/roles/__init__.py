"""The role table: every worker type, found by name. Adding one is a file here and a line in ROLES; no process changes."""

from shared.errors import NodeError
from shared.roles.aggregated import AGGREGATED
from shared.roles.role import Role

ROLES: dict[str, Role] = {role.name: role for role in (AGGREGATED,)}

PLANNED = ("prefill", "decode", "embedding", "rerank", "diffusion_lm", "mm_encode", "mm_worker", "image", "video")
"""Names of the roles that are not built yet; asking for one is an error at start, never a half-working node."""


def find(name: str) -> Role:
    """The role of that name. NodeError for one that isn't there (yet)."""
    if name in ROLES:
        return ROLES[name]
    if name in PLANNED:
        raise NodeError(f"worker type {name!r} is not supported by this version of sgnode; supported: {', '.join(ROLES)}")
    raise NodeError(f"unknown role {name!r}; known: {', '.join((*ROLES, *PLANNED))}")
