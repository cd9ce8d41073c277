"""SGLang's own generate request, carried through Dynamo's frontend as it is (dynamo.sglang 1.6.1, engine_generate.py).

The frontend keeps the client's body under ``extra_args.sglang_tito``; the worker replaces input, request id and routing.
"""

from typing import Any

from shared.errors import Code, RequestError
from shared.frames import Output
from shared.roles import media, tokens
from shared.roles.request import TokenRequest
from shared.roles.role import Asked, Payload

FIELD = "sglang_tito"
MEDIA = ("image_data", "video_data", "audio_data")
"""Fields of that request that no worker takes."""


def body(asked: Asked) -> dict[str, Any] | None:
    """The client's body, when this is such a request."""
    extra = asked.request.get("extra_args")
    found = extra.get(FIELD) if isinstance(extra, dict) else None
    return found if isinstance(found, dict) else None


def to_engine(
    body: dict[str, Any], read: TokenRequest, asked: Asked, *, overrides: dict[str, Any] | None = None, **more: Any
) -> list[Payload]:
    """One payload a sample. ``overrides``: of its sampling parameters; ``more``: of GenerateReqInput's fields."""
    media.refuse(asked.request)
    if given := [name for name in MEDIA if body.get(name)]:
        # SGLang would open and fetch whatever it names.
        raise RequestError(Code.INVALID, f"{given[0]}: media are taken by /v1/chat/completions")
    params = body.get("sampling_params")
    if params is not None and not isinstance(params, dict):
        raise RequestError(Code.INVALID, "sampling_params: expected an object")
    count = (params or {}).get("n")
    if count is None:
        count = 1
    if type(count) is not int or not 1 <= count <= 128:
        raise RequestError(Code.INVALID, f"sampling_params.n: expected 1 to 128, got {count!r}")
    if overrides is not None:
        params, count = {**(params or {}), **overrides}, 1
    fields = {**tokens.routing_arguments(read), **more}
    if (salt := tokens.cache_salt(asked.request) or body.get("cache_salt")) is not None:
        fields["cache_salt"] = salt
    if asked.trace:
        fields["external_trace_header"] = asked.trace
    asked.kept["samples"] = count
    asked.kept["native"] = _public_id(body, asked)
    payload: Payload = {"call": "native", "native": body, "input_ids": read.token_ids, "fields": fields}
    if asked.request.get("model"):
        payload["asks"] = {"model": asked.request["model"]}
    if params is not None:
        payload["sampling_params"] = {**params, "n": 1}
    if body.get("session_params") is not None:
        # SGLang continues sessions by the id that the client knows.
        payload["session_rid"] = asked.kept["native"]
    return [payload] * count


def _public_id(body: dict[str, Any], asked: Asked) -> str:
    rid = body.get("rid")
    if rid is None or rid == "":
        return asked.context_id
    if not isinstance(rid, str):
        raise RequestError(Code.INVALID, f"rid: expected a string, got {rid!r}")
    return rid


def to_dynamo(output: Output, index: int, asked: Asked, *, cache_report: bool) -> dict[str, Any] | None:
    """SGLang's answer as it is, under the client's own request id."""
    answer = (output.meta or {}).get("native")
    if answer is None:
        return None
    several = asked.kept["samples"] > 1
    public = f"{asked.kept['native']}_{index}" if several else asked.kept["native"]
    answer = {**answer, "meta_info": {**answer.get("meta_info", {}), "id": public}, "output_ids": output.token_ids}
    if output.text is not None:
        answer["text"] = output.text
    if several:
        answer["index"] = index
    data: dict[str, Any] = {"sglang_response": answer}
    if output.finish is not None and cache_report and not several:
        data.update(tokens.cache_hit(answer["meta_info"]))
    return {"token_ids": [], "engine_data": data}
