"""Short ways to write requests down: defaults that make an answer repeatable, and both kinds of delivery."""

from dataclasses import replace
from typing import Any

from tests.parity.case import Case, Compare
from tests.parity.configurations import MODEL

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
TEXT = "The quick brown fox"
TOKENS = 12
ENDS_SOON, ENDS_SOON_IDS = "sun", [40, 50, 60]
"""Of a chat and of a completion: the greedy answer has an end of its own, after 27 and 4 tokens."""
LAST_ID = 353
"""The demo models' last token id."""
STOP_IDS = list(range(60, 92))
"""As many as the frontend takes; the greedy answers to TEXT have one of them among their first tokens."""
ABSENT = object()
"""As an option's value: leave the default out."""


def _case(name: str, path: str, defaults: dict[str, Any], options: dict[str, Any]) -> Case:
    compare: Compare = options.pop("compare", "exact")
    cached, headers = options.pop("cached", False), options.pop("headers", {})
    wanted, alone = options.pop("wanted", None), options.pop("alone", "")
    body = {key: value for key, value in {**defaults, **options}.items() if value is not ABSENT}
    return Case(name, path, body, compare, cached, headers, wanted, alone)


def chat(name: str, content: Any = TEXT, **options: Any) -> Case:
    """A greedy chat completion of one user's message, or of a list of messages."""
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    defaults = {"model": MODEL, "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    return _case(f"chat/{name}", CHAT, defaults, options)


def completion(name: str, prompt: Any = TEXT, **options: Any) -> Case:
    """A greedy completion."""
    defaults = {"model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    return _case(f"completion/{name}", COMPLETIONS, defaults, options)


def response(name: str, given: Any = TEXT, **options: Any) -> Case:
    defaults = {"model": MODEL, "input": given, "max_output_tokens": TOKENS, "temperature": 0}
    return _case(f"responses/{name}", RESPONSES, defaults, options)


def message(name: str, content: Any = TEXT, **options: Any) -> Case:
    """Anthropic's messages API."""
    messages = (
        content if isinstance(content, list) and content and "role" in content[0] else [{"role": "user", "content": content}]
    )
    defaults = {"model": MODEL, "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    return _case(f"messages/{name}", MESSAGES, defaults, options)


def streamed(case: Case, **more: Any) -> Case:
    """The same as a stream, with the usage at its end where the API asks for that."""
    assert isinstance(case.body, dict)
    usage = {"stream_options": {"include_usage": True}} if case.path in (CHAT, COMPLETIONS) else {}
    return replace(case, name=f"{case.name}/stream", body={**case.body, "stream": True, **usage, **more})


def both(*cases: Case) -> list[Case]:
    return [made for case in cases for made in (case, streamed(case))]
