"""Text mode (--use-sglang-tokenizer): the worker gets the OpenAI request and answers with text."""

from typing import Any

from tests.parity.case import Case
from tests.parity.configurations import MODEL
from tests.parity.corpus.build import ABSENT, ENDS_SOON, STOP_IDS, both, chat, completion, message, response, streamed
from tests.parity.corpus.guided import SCHEMA
from tests.parity.corpus.tools import TOOLS

DRAWN: dict[str, Any] = {"temperature": 1.0, "max_tokens": 8, "compare": "shape"}
LONG = "The quick brown fox jumps over the lazy dog. " * 20

CASES: list[Case] = [
    *both(
        chat("plain"),
        chat("several turns", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One."}]),
        chat("unicode", "naïve 日本語 🙂", max_tokens=24),
        chat("until eos", ENDS_SOON, max_tokens=200),
        chat("stop", stop=["o", "e"], max_tokens=40),
        chat("stop one", stop="o", max_tokens=40),
        chat("min_tokens", min_tokens=4),
        chat("n 2", n=2, temperature=1.0, top_k=1),
        chat("logprobs", logprobs=True, top_logprobs=2),
        chat("tools", tools=TOOLS),
        chat("too long", "word " * 5000),
        chat("unknown model", model="nobody"),
        chat("format", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, max_tokens=40),
        chat("guided_regex", guided_regex="[ab]{3}"),
        chat("extra_fields", nvext={"extra_fields": ["stop_reason", "engine_data", "token_ids"]}),
        completion("plain"),
        completion("ids", [20, 30, 40]),
        completion("list", ["one", "two"]),
        completion("stop", stop=["o", "e"], max_tokens=40),
        completion("logprobs", logprobs=2),
        completion("echo", echo=True),
    ),
    chat("max_tokens absent", max_tokens=ABSENT, stop=["o", "e", "a"]),
    chat("max_tokens 1", max_tokens=1),
    chat("max_tokens 0", max_tokens=0),
    chat("max_completion_tokens", ENDS_SOON, max_tokens=ABSENT, max_completion_tokens=5),
    chat("ignore_eos", ENDS_SOON, ignore_eos=True, max_tokens=60),
    chat("stop_token_ids", stop_token_ids=STOP_IDS, max_tokens=40),
    chat("top_p 7", top_p=7.0),
    chat("temperature negative", temperature=-1.0),
    chat("penalties", frequency_penalty=1.0, presence_penalty=0.5),
    chat("drawn", **DRAWN),
    chat("seed", seed=7, **DRAWN),
    chat("top_k", temperature=1.0, top_k=1),
    chat("no messages", []),
    chat("long", LONG),
    chat("long again", LONG),
    streamed(chat("long again", LONG)),
    chat("skip_special_tokens", ENDS_SOON, skip_special_tokens=False, max_tokens=200),
    chat("thinking_token_budget", thinking_token_budget=5),
    chat("cache_salt", LONG, nvext={"cache_salt": "a"}),
    chat("token_data", nvext={"token_data": [20, 30]}),
    chat("parts", [{"role": "user", "content": [{"type": "text", "text": "One"}]}]),
    chat("image", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/n.png"}}]}]),
    completion("empty", ""),
    completion("too long", [5] * 4096),
    completion("list with n 2", ["one", "two"], n=2, temperature=1.0, top_k=1),
    response("plain", ENDS_SOON),
    message("plain", ENDS_SOON),
    Case("path/models", "/v1/models", None),
    Case("generate/plain", "/generate", {"model": MODEL, "input_ids": [20, 30], "stream": True}),
]
