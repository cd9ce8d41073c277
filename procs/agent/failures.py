"""Which Dynamo exception a failed request raises: that decides whether a frontend continues it elsewhere.

Measured with Dynamo 1.6.1: EngineShutdown migrates and takes the whole instance out of routing for some seconds;
Disconnected (in mid-stream) and CannotConnect (before the first chunk) migrate and leave the instance in; InvalidArgument
is a 400 with its text; an untyped exception is a 500 and is not retried.
"""

from typing import Any

from dynamo.llm.exceptions import CannotConnect, Disconnected, EngineShutdown, HttpError, InvalidArgument

from shared.errors import Code, RequestError

MESSAGE_LIMIT = 8192
"""Dynamo cuts longer messages."""


def exception(error: RequestError, *, started: bool) -> Exception:
    """The exception for a typed failure. ``started``: a chunk was sent already."""
    message = error.message[:MESSAGE_LIMIT]
    match error.code:
        case Code.INVALID:
            return InvalidArgument(message)
        case Code.ENGINE_DEAD | Code.DRAINING | Code.STALE:
            return EngineShutdown(message)
        case Code.GAP | Code.STALLED | Code.OVERLOADED | Code.PEER_DEAD:
            # One request's trouble must not take the instance out of routing.
            return Disconnected(message) if started else CannotConnect(message)
    return RuntimeError(message)


def abort_exception(finish: dict[str, Any], *, started: bool = False, handover: bool = False) -> Exception:
    """The exception for a terminal abort that nobody here asked for.

    ``handover``: a KV cache comes from another engine or goes to one.

    With a status code it is SGLang's verdict on the request (dynamo.sglang: _raise_if_sglang_error); without one the engine
    ended it by itself, which another worker may continue.
    """
    message = str(finish.get("message") or "SGLang aborted the request")[:MESSAGE_LIMIT]
    status = finish.get("status_code")
    if status is None and finish.get("err_type") is None:
        return EngineShutdown(message)
    if isinstance(status, bool) or not isinstance(status, int) or not 400 <= status < 600:
        status = 500
    if handover and status >= 500:
        # A handover that failed says nothing against the request: another pair of engines may do it.
        return exception(RequestError(Code.PEER_DEAD, message), started=started)
    return InvalidArgument(message) if status == 400 else HttpError(status, message)
