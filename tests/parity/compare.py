"""Two normalised answers to one request -> the list of their differences. Pure."""

import json
import math
from dataclasses import dataclass
from typing import Any

from tests.parity.case import Case
from tests.parity.client import Answer, error_of

TOLERANCE = 1e-3
"""Of log probabilities: the engines batch differently."""
GENERATED = {
    "content", "text", "reasoning_content", "thinking", "token", "tokens", "bytes", "logprob", "token_logprobs", "text_offset",
    "top_logprobs", "logprobs", "delta", "arguments", "output_text", "output_ids", "stop_reason", "nvext",
}  # fmt: skip
"""Keys below which ``shape`` compares types only."""
ABSENT = "<absent>"


@dataclass(frozen=True)
class Difference:
    """At ``path`` of the answer the incumbent has one value and sgnode another."""

    path: str
    incumbent: Any
    sgnode: Any


def compare(case: Case, incumbent: Answer, sgnode: Answer) -> list[Difference]:
    """Empty when the answers are alike in what the case compares."""
    if case.wanted is not None:
        right = (error_of(sgnode) or 200) == case.wanted
        return [] if right else [Difference("status wanted", case.wanted, f"{sgnode['status']} {_body(sgnode)}")]
    if case.compare == "status" or incumbent["status"] != sgnode["status"]:
        # One is an error and the other is not: their bodies have nothing to compare, only to be shown.
        one, other = incumbent["status"], sgnode["status"]
        found = [] if one == other else [Difference("status", f"{one} {_body(incumbent)}", f"{other} {_body(sgnode)}")]
    elif set(_chunks(incumbent)) ^ set(_chunks(sgnode)):
        found = [Difference("stream", incumbent["stream"]["chunks"], sgnode["stream"]["chunks"])]
    else:
        found = _differences("", incumbent, sgnode, shape=case.compare == "shape")
    if case.cached:
        for side, answer in (("incumbent", incumbent), ("sgnode", sgnode)):
            if not cached_tokens(answer):
                found.append(Difference(f"cached_tokens of {side}", "> 0", cached_tokens(answer)))
    return found


def _body(answer: Answer) -> str:
    return json.dumps(answer.get("body", answer.get("text", answer.get("stream"))), ensure_ascii=False)


def _chunks(answer: Answer) -> dict[str, Any]:
    """What a stream has: chunks of an answer, or an error."""
    found: dict[str, Any] = answer.get("stream", {}).get("chunks", {})
    return found


def cached_tokens(value: Any) -> int:
    """The largest number of cached tokens that an answer reports anywhere."""
    if isinstance(value, dict):
        named = [
            item for key, item in value.items() if key in ("cached_tokens", "cache_read_input_tokens") and isinstance(item, int)
        ]
        return max([0, *named, *map(cached_tokens, value.values())])
    if isinstance(value, list):
        return max([0, *map(cached_tokens, value)])
    return 0


def _differences(path: str, one: Any, other: Any, *, shape: bool) -> list[Difference]:
    if isinstance(one, dict) and isinstance(other, dict):
        found = []
        for key in [*one, *(key for key in other if key not in one)]:
            inner = f"{path}.{key}" if path else str(key)
            masked = shape and key in GENERATED
            if key not in one or key not in other:
                found.append(Difference(inner, one.get(key, ABSENT), other.get(key, ABSENT)))
            elif masked:
                if _kind(one[key]) != _kind(other[key]):
                    found.append(Difference(inner, _kind(one[key]), _kind(other[key])))
            else:
                found += _differences(inner, one[key], other[key], shape=shape)
        return found
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return [Difference(path, one, other)]
        pairs = enumerate(zip(one, other, strict=True))
        return [found for index, (a, b) in pairs for found in _differences(f"{path}[{index}]", a, b, shape=shape)]
    return [] if _equal(one, other) else [Difference(path, one, other)]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return type(one) is type(other) and bool(one == other)


def _kind(value: Any) -> str:
    """The type, and of text that it is there."""
    return "str" if isinstance(value, str) and value else "empty str" if isinstance(value, str) else type(value).__name__
