"""Role ``mm_decode``: has a prefill worker compute a prompt with its media, and goes on from there (dynamo.sglang 1.6.1)."""

import json
from typing import Any

from shared.errors import Code, RequestError
from shared.frames import Output
from shared.roles import decode, mm_wire, request, tokens
from shared.roles.decode import one_sample
from shared.roles.role import Asked, Callee, Chunk, Payload, Role


def to_worker(asked: Asked) -> str | None:
    """The request as it came; None when it says already where its KV cache is, as a canary does. Raises RequestError(INVALID)."""
    whole = asked.request
    mm_wire.unwrap(asked)
    read = request.read(asked.request)
    if read.bootstrap_info is not None:
        return None
    one_sample(read, None)
    tokens.check(read, asked)
    inner = whole if isinstance(whole.get("request"), dict) else {"request": whole}
    return mm_wire.text({"request": inner, "sampling_params": tokens.sampling_params(read, asked.facts)})


def from_worker(chunk: Chunk, asked: Asked) -> Chunk | None:
    """The first chunk says where the KV cache will be. Raises RequestError(INTERNAL): dynamo.sglang has errors in chunks."""
    try:
        found: Any = json.loads(chunk) if isinstance(chunk, str) else chunk
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("bootstrap_room") is None or found.get("finish_reason") == "error":
        why = found.get("error") if isinstance(found, dict) else chunk
        raise RequestError(Code.INTERNAL, f"the prefill worker did not say where the KV cache is: {str(why)[:200]}")
    where = {name: found.get(name) for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room")}
    asked.request = {**asked.request, "bootstrap_info": where}
    return None


def to_engine(asked: Asked) -> list[Payload]:
    """Raises RequestError."""
    mm_wire.unwrap(asked)
    return [{**payload, **mm_wire.arguments(asked, transfers=False)} for payload in decode.to_engine(asked)]


def to_dynamo(output: Output, index: int, asked: Asked) -> Chunk | None:
    chunk = tokens.chunk_of(output, index, asked, cache_report=False)
    return chunk and {**chunk, "finished": output.finish is not None}


MM_DECODE = Role(
    name="mm_decode",
    worker_type="Decode",
    needs=(("Prefill",),),
    model_input="Tokens",
    model_type="Empty",
    to_engine=to_engine,
    to_dynamo=to_dynamo,
    canary=decode.canary,
    canary_request=decode.canary_request,
    callee=Callee("prefill", to_worker, from_worker, first=True),
)
