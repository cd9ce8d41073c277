"""Dynamo's variables for health checks and the system port's paths, as Dynamo 1.6.1 takes them.

Of a value that it doesn't take, each agent's and the frontend's runtime ends again and again: here it is an error at start.
"""

from collections.abc import Mapping
from typing import Any

from shared.errors import NodeError

SECONDS = {
    "DYN_CANARY_WAIT_TIME": "canary_wait",
    "DYN_HEALTH_CHECK_REQUEST_TIMEOUT": "canary_timeout",
    "DYN_HEALTH_CHECK_BUSY_STALL": "busy_stall",
}
PATHS = {"DYN_SYSTEM_HEALTH_PATH": "health_path", "DYN_SYSTEM_LIVE_PATH": "live_path"}
TAKEN = ("/ready", "/metrics", "/metadata", "/engine", "/v1")
"""Paths of the system port that are something else."""


def read(environ: Mapping[str, str]) -> dict[str, Any]:
    """Fields of NodeConfig by name, those that a variable sets. Raises NodeError naming the variable."""
    found: dict[str, Any] = {field: _seconds(name, environ[name]) for name, field in SECONDS.items() if environ.get(name)}
    found |= {field: _path(name, environ[name]) for name, field in PATHS.items() if environ.get(name)}
    if found.get("health_path", "/health") == found.get("live_path", "/live"):
        raise NodeError("DYN_SYSTEM_HEALTH_PATH and DYN_SYSTEM_LIVE_PATH: expected two paths, they are the same")
    if text := environ.get("DYN_SYSTEM_STARTING_HEALTH_STATUS"):
        if text not in ("ready", "notready"):
            raise NodeError(f"DYN_SYSTEM_STARTING_HEALTH_STATUS: expected ready or notready, got {text!r}")
        found["starting_status"] = text
    if text := environ.get("DYN_HEALTH_CHECK_ENABLED"):
        if text not in ("true", "false"):
            raise NodeError(f"DYN_HEALTH_CHECK_ENABLED: expected true or false, got {text!r}")
        found["canaries"] = text == "true"
    return found


def _seconds(name: str, text: str) -> float:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) < 10**9:
        raise NodeError(f"{name}: expected whole seconds from 1, got {text!r}")
    return float(text)


def _path(name: str, text: str) -> str:
    first = "/" + text.lstrip("/").partition("/")[0]
    if not text.startswith("/") or text == "/" or not text.isascii() or any(c in text for c in " {}?#") or first in TAKEN:
        raise NodeError(f"{name}: expected a path like /health that the port has no other use for, got {text!r}")
    return text
