"""Tool calls and reasoning, with parsers on the worker's card; a regular expression makes the model say what they parse."""

from typing import Any

from tests.parity.case import Case
from tests.parity.corpus.build import ABSENT, both, chat, completion, message, response, streamed
from tests.parity.corpus.guided import SCHEMA
from tests.parity.corpus.responses import ANTHROPIC_TOOL, OPENAI_TOOL, WEATHER


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": f"The {name}.", "parameters": WEATHER, **more}}


TOOLS = [tool("weather"), tool("time")]
STRICT = tool("weather", strict=True, parameters={**WEATHER, "additionalProperties": False})
UNTHINKING: dict[str, Any] = {"thinking": {"type": "disabled"}}
UNREASONED: dict[str, Any] = {"reasoning": {"effort": "none"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
CALLS = CALL + '\n<tool_call>\n{"name": "time", "arguments": {"city": "Rome"}}\n</tool_call>'


def calling(name: str, **options: Any) -> Case:
    """A request with tools that does not think first: this reasoning parser takes all for a thought until that ends."""
    return chat(name, **{"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}, **options})


def says(text: str) -> dict[str, Any]:
    """Options that make the model say exactly this."""
    for sign in "\\{}[]().*+?^$|":
        text = text.replace(sign, f"\\{sign}")
    return {"guided_regex": text, "max_tokens": 200}


NAMED = {"type": "function", "function": {"name": "weather"}}

CASES: list[Case] = [
    *both(
        chat("tools/none given"),
        calling("tools/auto"),
        calling("tools/auto named", tool_choice="auto"),
        calling("tools/choice none", tool_choice="none"),
        calling("tools/choice required", tool_choice="required", max_tokens=60),
        calling("tools/choice by name", tool_choice=NAMED, max_tokens=60),
        calling("tools/one call", **says(CALL)),
        calling("tools/two calls", **says(CALLS)),
        calling("tools/text and call", **says("Let me see. " + CALL)),
        calling("tools/call and text", **says(CALL + " So.")),
        calling("tools/call without tools", tools=ABSENT, **says(CALL)),
        calling("tools/call of choice none", tool_choice="none", **says(CALL)),
        calling("tools/unknown call", **says(CALL.replace("weather", "nothing"))),
        calling("tools/broken call", **says('<tool_call>\n{"name": "weather", "arg')),
        calling("tools/n 2", n=2, temperature=1.0, top_k=1, **says(CALL)),
        calling("tools/logprobs", logprobs=True, **says(CALL)),
        calling("tools/strict", tools=[STRICT], tool_choice="required", max_tokens=60),
        calling("tools/parallel off", parallel_tool_calls=False, **says(CALLS)),
        chat("tools/not switched off", tools=TOOLS),
        chat("tools/required, thinking", tools=TOOLS, tool_choice="required", max_tokens=60),
        chat("reasoning/open", **says("hm</think>So it is.")),
        chat("reasoning/never closed", **says("hm hm")),
        chat("reasoning/and call", tools=TOOLS, **says("hm</think>" + CALL)),
        chat("reasoning/logprobs", logprobs=True, **says("hm</think>So.")),
        chat("reasoning/n 2", n=2, temperature=1.0, top_k=1, **says("hm</think>So.")),
        chat("reasoning/json after", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}),
        chat("reasoning/off", chat_template_kwargs={"enable_thinking": False}, **says("So it is.")),
        chat("reasoning/on", chat_template_kwargs={"enable_thinking": True}, **says("hm</think>So it is.")),
        chat("reasoning/effort none", reasoning_effort="none", **says("So it is.")),
        chat("thinking budget/5", thinking_token_budget=5, max_tokens=30),
        chat("thinking budget/0", thinking_token_budget=0, max_tokens=30),
        chat("thinking budget/nvext", nvext={"max_thinking_tokens": 5}, max_tokens=30),
        message("tools/one", tools=[ANTHROPIC_TOOL], **UNTHINKING),
        message("tools/any", tools=[ANTHROPIC_TOOL], tool_choice={"type": "any"}, **UNTHINKING, max_tokens=60),
        message(
            "tools/named",
            tools=[ANTHROPIC_TOOL],
            tool_choice={"type": "tool", "name": "weather"},
            **UNTHINKING,
            max_tokens=60,
        ),
        message("thinking", thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=1100, stop_sequences=["o", "e"]),
        response("tools/required", tools=[OPENAI_TOOL], tool_choice="required", **UNREASONED, max_output_tokens=60),
        response("tools/one", tools=[OPENAI_TOOL], **UNREASONED),
    ),
    chat("tools/empty", tools=[]),
    chat("tools/required without tools", tool_choice="required"),
    calling("tools/choice unknown name", tool_choice={"type": "function", "function": {"name": "nothing"}}),
    calling("tools/choice wrong", tool_choice="perhaps"),
    calling("tools/required with format", tool_choice="required", response_format={"type": "json_object"}),
    calling("tools/required with regex", tool_choice="required", **says(CALL)),
    chat("tools/no name", tools=[{"type": "function", "function": {}}]),
    chat("tools/bad schema", tools=[tool("weather", parameters={"type": "nonsense"})], tool_choice="required"),
    chat("tools/no parameters", tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="required", max_tokens=60),
    chat("thinking budget/-1", thinking_token_budget=-1),
    chat("thinking budget/2**32", thinking_token_budget=2**32),
    chat("thinking budget/off", thinking_token_budget=5, chat_template_kwargs={"enable_thinking": False}),
    chat("thinking budget/n 2", thinking_token_budget=5, n=2, temperature=1.0, top_k=1),
    completion("thinking budget/5", thinking_token_budget=5),
    # The custom template's own words: a wrong template gives other tokens and another count of them.
    *both(
        chat("template/plain", nvext={"annotations": ["formatted_prompt", "token_ids"]}),
        chat("template/argument", chat_template_kwargs={"shout": "loud"}, nvext={"annotations": ["formatted_prompt"]}),
        chat("template/args", chat_template_args={"shout": "loud"}, nvext={"annotations": ["formatted_prompt"]}),
        chat("template/tools", tools=TOOLS, nvext={"annotations": ["formatted_prompt"]}),
    ),
    completion("template/none"),
    streamed(completion("template/none")),
]
