"""Typed failures of a request, and which of them a frontend may continue on another worker."""

import enum


class Code(enum.StrEnum):
    """Why a request ended without a terminal output. ``migratable`` ones are retried by Dynamo's frontend."""

    INVALID = "invalid_argument"
    """The request itself is wrong: HTTP 400, never retried."""
    ENGINE_DEAD = "engine_dead"
    """The engine died or is being stopped: migratable, and the frontend avoids this worker for a while."""
    DRAINING = "draining"
    """The node is draining and takes no new requests: migratable, this worker is avoided."""
    STALE = "stale"
    """Submitted to an earlier incarnation: migratable."""
    STALLED = "stalled"
    """The peer did not take its tokens for too long and was cut off: migratable for this request only."""
    GAP = "gap"
    """Tokens are missing in the stream (an offset did not follow): migratable for this request only."""
    OVERLOADED = "overloaded"
    """A bound was reached: migratable for this request only."""
    PEER_DEAD = "peer_dead"
    """The engine that had this request's KV cache died before it was here: migratable for this request only."""
    UNKNOWN = "unknown"
    """There is no control of that name."""
    INTERNAL = "internal"
    """A defect: an untyped error for the client."""


class NodeError(Exception):
    """An operator's mistake or an environment that can't work: shown as one line, exit code 2."""


class RequestError(Exception):
    """A request that failed with a typed code."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
