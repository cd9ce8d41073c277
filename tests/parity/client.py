"""Send one request and normalise the answer: the same content gives the same plain data, whatever its ids and chunks."""

import json
import re
from typing import Any

import requests

from tests.parity.case import Case

Answer = dict[str, Any]
"""``status``, ``type`` and either ``body`` (a whole answer), ``text`` (no JSON) or ``stream``."""

TIMEOUT_SECONDS = 60
VOLATILE = {
    "created", "created_at", "completed_at", "system_fingerprint", "obfuscation", "worker_id", "timing",
    "sequence_number", "e2e_latency", "queue_time", "request_received_ts", "response_sent_to_client_ts", "decode_throughput",
}  # fmt: skip
"""Keys whose values never compare: times, workers, counts of chunks. That they are there is compared."""
IDS = re.compile(
    r"(?<![a-z])(?:call|toolu|fc|rs|msg|resp|chatcmpl|cmpl)[-_][0-9A-Za-z-]{8,}"
    r"|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|\b[0-9a-f]{32}\b|\b\d{15,20}\b|\[\d\d:\d\d:\d\d\]"
)
"""In any text: ids of requests, answers and workers, and the clock in a library's messages."""


def ask(session: requests.Session, url: str, case: Case) -> Answer:
    """The normalised answer; a connection that breaks is an answer too."""
    body = case.body if isinstance(case.body, str) else json.dumps(case.body)
    headers = {"content-type": "application/json", **case.headers}
    try:
        if case.body is None:
            got = session.get(url + case.path, headers=headers, timeout=TIMEOUT_SECONDS)
        else:
            got = session.post(url + case.path, data=body.encode(), headers=headers, timeout=TIMEOUT_SECONDS)
    except requests.RequestException as error:
        return {"status": 0, "type": "none", "text": type(error).__name__}
    kind = got.headers.get("content-type", "").partition(";")[0]
    answer: Answer = {"status": got.status_code, "type": kind}
    text = got.content.decode("utf-8", "replace")
    if kind == "text/event-stream":
        answer["stream"] = fold(events(text))
        return answer
    try:
        body = plain(json.loads(text))
        if isinstance(body, dict) and body.get("object") == "list" and case.body is None:
            body["data"].sort(key=json.dumps)  # a list of models has no order
        answer["body"] = body
    except json.JSONDecodeError:
        answer["text"] = IDS.sub("<id>", text)
    return answer


def unsent(why: str) -> Answer:
    """In place of an answer: the request was not sent."""
    return {"status": 0, "type": "none", "text": f"not sent: {why}"}


def error_of(answer: Answer) -> int | None:
    """The status of an error, also of one that came when a stream had begun; None for an answer."""
    if answer["status"] != 200:
        return int(answer["status"])
    chunks = answer.get("stream", {}).get("chunks", {})
    errors = [chunk["error"] for chunk in chunks.values() if isinstance(chunk.get("error"), dict)]
    return int(errors[0].get("code") or 400) if errors else None


def plain(value: Any) -> Any:
    """The value with its ids and times replaced."""
    if isinstance(value, dict):
        return {key: _volatile(item) if key in VOLATILE else plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return IDS.sub("<id>", value) if isinstance(value, str) else value


def _volatile(value: Any) -> Any:
    return None if value is None else f"<{type(value).__name__}>"


def events(text: str) -> list[tuple[str, str]]:
    """Server-sent events as (name, data); a comment is an event named ``:``."""
    found = []
    for block in re.split(r"\r?\n\r?\n", text):
        name, data = "", []
        for line in block.splitlines():
            key, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if key == "event":
                name = value
            elif key == "data":
                data.append(value)
            elif key == "":
                name = name or ":"
                data.append(value)
        if name or data:
            found.append((name, "\n".join(data)))
    return found


def fold(found: list[tuple[str, str]]) -> dict[str, Any]:
    """A stream as one answer. Chunk boundaries vanish: texts join, lists of tokens join, the last of everything else stays.

    ``events``: the names in their order, repetitions collapsed; ``texts``: the data that is no JSON object.
    """
    result: dict[str, Any] = {"events": [], "texts": {}, "chunks": {}}
    for name, data in found:
        try:
            value = json.loads(data)
        except json.JSONDecodeError:
            value = None
        if value is None or not isinstance(value, dict):
            label = name or ("[DONE]" if data == "[DONE]" else "text")
            result["texts"].setdefault(label, []).append(IDS.sub("<id>", data))
        else:
            label = name or str(value.get("type") or value.get("object") or "data")
            _merge(result["chunks"].setdefault(label, {}), plain(value))
        if not result["events"] or result["events"][-1] != label:
            result["events"].append(label)
    # Of one event, and so of one chunk: how many there are is not compared, nor the order of those of before the answer.
    if isinstance(delta := result["chunks"].get("content_block_delta"), dict):
        delta.pop("usage", None)
    notes = [label for label in result["events"] if label in result["texts"] and label != "[DONE]"]
    result["events"] = [*sorted(notes), *(label for label in result["events"] if label not in notes)]
    for chunks in result["chunks"].values():
        if isinstance(chunks.get("choices"), dict):
            chunks["choices"] = dict(sorted(chunks["choices"].items()))
    return result


JOINED = {"content", "text", "reasoning_content", "reasoning", "refusal", "arguments", "partial_json", "thinking", "delta"}
"""Strings that a stream sends in pieces."""
BY_INDEX = {"choices", "tool_calls"}
"""Lists whose items are pieces of the item of that index."""
APPENDED = {
    "tokens", "token_logprobs", "top_logprobs", "text_offset", "content", "refusal", "output_ids",
    "completion_token_ids",
    *(f"output_{what}" for what in ("token_logprobs", "top_logprobs", "token_ids_logprobs")),
}  # fmt: skip
"""Lists that a stream sends in pieces."""


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        known = into.get(key)
        if key in BY_INDEX and isinstance(value, list):
            items = into[key] = known if isinstance(known, dict) else {}
            for place, item in enumerate(value):
                index = str(item.get("index", place))
                _merge(items.setdefault(index, {}), item)
        elif value is None:
            into.setdefault(key, None)
        elif key in JOINED and isinstance(value, str):
            into[key] = (known or "") + value
        elif key in APPENDED and isinstance(value, list):
            into[key] = [*(known or []), *value]
        elif isinstance(value, dict):
            into[key] = known if isinstance(known, dict) else {}
            _merge(into[key], value)
        else:
            into[key] = value
