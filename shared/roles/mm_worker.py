"""Role ``mm_worker``: prefill and decode in one, behind an encode worker (MultimodalWorkerHandler of dynamo.sglang 1.6.1)."""

from shared.frames import Output
from shared.roles import mm_wire, request, tokens
from shared.roles.role import Asked, Chunk, Payload, Role


def to_engine(asked: Asked) -> list[Payload]:
    """One payload a sample; they share the embeddings. Raises RequestError(INVALID)."""
    mm_wire.unwrap(asked)
    read = request.read(asked.request)
    tokens.check(read, asked)
    payloads = tokens.samples(tokens.payload_of(read, asked), read.sampling_options, asked)
    return [{**payload, **mm_wire.arguments(asked)} for payload in payloads]


def to_dynamo(output: Output, index: int, asked: Asked) -> Chunk | None:
    chunk = tokens.chunk_of(output, index, asked, cache_report=True)
    return chunk and {**chunk, "finished": output.finish is not None}


MM_WORKER = Role(
    name="mm_worker",
    worker_type="Aggregated",
    needs=(("Encode",),),
    model_input="Tokens",
    model_type="Empty",
    to_engine=to_engine,
    to_dynamo=to_dynamo,
    canary=tokens.canary_payload,
    canary_request=tokens.canary_request,
)
