"""OpenAI's responses API and Anthropic's messages API."""

from typing import Any

from tests.parity.case import Case
from tests.parity.configurations import ALIAS
from tests.parity.corpus.build import ABSENT, ENDS_SOON, MESSAGES, RESPONSES, both, message, response
from tests.parity.corpus.guided import SCHEMA

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
OPENAI_TOOL = {"type": "function", "name": "weather", "description": "The weather.", "parameters": WEATHER}
ANTHROPIC_TOOL = {"name": "weather", "description": "The weather.", "input_schema": WEATHER}
LONG = "A node serves requests; a crash stays where it happened. " * 10


def items(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]} for text in texts]


RESPONSE_CASES = [
    *both(
        response("plain"),
        response("items", items("One.", "Two.")),
        response("instructions", instructions="Be brief."),
        response("one token", max_output_tokens=1),
        response("until eos", ENDS_SOON, max_output_tokens=200),
        response("format", text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}, max_output_tokens=40),
        response("unknown model", model="nobody"),
        response("too long", "word " * 5000),
        response("tools", tools=[OPENAI_TOOL]),
        response("tool required", tools=[OPENAI_TOOL], tool_choice="required", max_output_tokens=40),
        response("alias", model=ALIAS),
    ),
    response("roles", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One."}]),
    response("long", LONG),
    response("long again", LONG, cached=True),
    response("no length", ENDS_SOON, max_output_tokens=ABSENT),
    response("length 0", max_output_tokens=0),
    response("input absent", input=ABSENT),
    response("input empty", ""),
    response("input empty list", []),
    response("input a number", 5),
    response("store", store=True),
    response("previous", previous_response_id="resp_1"),
    response("background", background=True),
    response("reasoning", reasoning={"effort": "low"}),
    response("top_logprobs", top_logprobs=2, include=["message.output_text.logprobs"]),
    response("top_p", top_p=7.0),
    response("temperature", temperature=3.0),
    response("metadata", metadata={"a": "b"}),
    response("truncation", truncation="auto"),
    response("image", [{"role": "user", "content": [{"type": "input_image", "image_url": "http://127.0.0.1:9/n.png"}]}]),
    Case("responses/no json", RESPONSES, "{"),
]

MESSAGE_CASES = [
    *both(
        message("plain"),
        message("system", system="Be brief."),
        message("system blocks", system=[{"type": "text", "text": "Be brief."}]),
        message("blocks", [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]),
        message("one token", max_tokens=1),
        message("until eos", ENDS_SOON, max_tokens=200),
        message("stop", stop_sequences=["o", "e"], max_tokens=40),
        message("tools", tools=[ANTHROPIC_TOOL]),
        message("tool forced", tools=[ANTHROPIC_TOOL], tool_choice={"type": "any"}, max_tokens=40),
        message("thinking", thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2048, stop_sequences=["o", "e"]),
        message("thinking off", thinking={"type": "disabled"}),
        message("unknown model", model="nobody"),
        message("too long", "word " * 5000),
    ),
    message("turns", [{"role": role, "content": f"{role}."} for role in ("user", "assistant", "user")]),
    message("long", LONG),
    message("long again", LONG, cached=True),
    message("top_k", top_k=1, temperature=1.0),
    message("top_p", top_p=7.0),
    message("no length", max_tokens=ABSENT),
    message("length 0", max_tokens=0),
    message("no messages", messages=[]),
    message("metadata", metadata={"user_id": "u"}),
    message("tool result", [{"type": "tool_result", "tool_use_id": "t1", "content": "5"}]),
    message("image", [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}]),
    message("image url", [{"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:9/n.png"}}]),
    message("cache_control", [{"type": "text", "text": "One.", "cache_control": {"type": "ephemeral"}}]),
    message("cache_salt", nvext={"cache_salt": 5}),
    Case("messages/no json", MESSAGES, "{"),
    Case("messages/count", f"{MESSAGES}/count_tokens", {"model": "demo", "messages": [{"role": "user", "content": "One."}]}),
]

CASES: list[Case] = [*RESPONSE_CASES, *MESSAGE_CASES]
