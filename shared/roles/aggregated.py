"""Role ``aggregated``: prefill and decode in one engine, tokens in, tokens out (dynamo.sglang 1.6.1, DecodeWorkerHandler)."""

from shared.frames import Output
from shared.roles import media, native, request, tokens
from shared.roles.role import Asked, Chunk, Payload, Role


def to_engine(asked: Asked) -> list[Payload]:
    """One payload a sample. Raises RequestError(INVALID) for what SGLang would only reject after tokenising."""
    read = request.read(asked.request)
    tokens.check(read, asked)
    if (body := native.body(asked)) is not None:
        return native.to_engine(body, read, asked)
    payload = {**tokens.payload_of(read, asked), **media.hashes(asked)}
    return tokens.samples(payload, read.sampling_options, asked)


def to_dynamo(output: Output, index: int, asked: Asked) -> Chunk | None:
    if "native" in asked.kept:
        return native.to_dynamo(output, index, asked, cache_report=True)
    return tokens.chunk_of(output, index, asked, cache_report=True)


AGGREGATED = Role(
    name="aggregated",
    worker_type="Aggregated",
    needs=(),
    model_input="Tokens",
    model_type="",
    to_engine=to_engine,
    to_dynamo=to_dynamo,
    canary=tokens.canary_payload,
    canary_request=tokens.canary_request,
    takes_media=True,
)
