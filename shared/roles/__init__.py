"""The role table: every worker type, found by name. Adding one is a file here and a line in ROLES; no process changes."""

from shared.errors import NodeError
from shared.roles.aggregated import AGGREGATED
from shared.roles.decode import DECODE
from shared.roles.diffusion_lm import DIFFUSION_LM
from shared.roles.embedding import EMBEDDING
from shared.roles.image import IMAGE
from shared.roles.mm_decode import MM_DECODE
from shared.roles.mm_encode import MM_ENCODE
from shared.roles.mm_prefill import MM_PREFILL
from shared.roles.mm_worker import MM_WORKER
from shared.roles.prefill import PREFILL
from shared.roles.rerank import RERANK
from shared.roles.role import Role
from shared.roles.text import text_mode
from shared.roles.video import VIDEO

LISTED = (
    AGGREGATED, PREFILL, DECODE, EMBEDDING, RERANK, DIFFUSION_LM, MM_ENCODE, MM_WORKER, MM_PREFILL, MM_DECODE, IMAGE, VIDEO,
)  # fmt: skip
ROLES: dict[str, Role] = {role.name: role for role in LISTED}


def find(name: str, *, text: bool = False) -> Role:
    """The role of that name, ``text``: in text mode. NodeError for one that isn't there."""
    if name in ROLES:
        role = ROLES[name]
        # Prefill has the frontend's tokens in any case, and so have workers behind another; the pooling roles take text as it is.
        return text_mode(role) if text and role.generates and role.model_type not in ("Prefill", "Empty") else role
    raise NodeError(f"unknown role {name!r}; known: {', '.join(ROLES)}")
