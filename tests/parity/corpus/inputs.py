"""What goes in: prompts of every form, bad ones, models by name, media, unicode, and other paths of the frontend."""

from typing import Any

from tests.parity.case import Case
from tests.parity.configurations import ALIAS, MODEL
from tests.parity.corpus.build import ABSENT, CHAT, COMPLETIONS, LAST_ID, TEXT, both, chat, completion, streamed

EMOJI = "naïve café 日本語 🙂👩‍👩‍👧 e\u0301"
IMAGE = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def part(kind: str, **value: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": "What is it?"}, {"type": kind, **value}]


def turns(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in zip(("user", "assistant") * 5, contents, strict=False)]


CHATS = [
    *both(
        chat("unicode", EMOJI, ignore_eos=True),
        chat("several turns", [{"role": "system", "content": "Be brief."}, *turns("One.", "Two.", "Three?")]),
        chat("alias", model=ALIAS),
    ),
    chat("parts of text", [{"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]}]),
    chat("developer", [{"role": "developer", "content": "Be brief."}, *turns("One.")]),
    chat("assistant last", turns("One.", "Two")),
    chat("continue_final_message", turns("One.", "Two"), continue_final_message=True, add_generation_prompt=False),
    chat("no generation prompt", add_generation_prompt=False),
    chat("contradicting prompts", turns("One.", "Two"), continue_final_message=True, add_generation_prompt=True),
    chat("chat_template_args", chat_template_args={"a": 1}),
    chat("chat_template_kwargs", chat_template_kwargs={"a": 1}),
    chat("named", [{"role": "user", "name": "ann", "content": "One."}]),
    chat("tool result", [*turns("One."), {"role": "tool", "tool_call_id": "c1", "content": "5"}]),
    chat(
        "calls in the past",
        [
            *turns("One."),
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "5"},
        ],
    ),
    chat("long", "The quick brown fox jumps over the lazy dog. " * 60),
    chat("long again", "The quick brown fox jumps over the lazy dog. " * 60, cached=True),
    streamed(chat("long again", "The quick brown fox jumps over the lazy dog. " * 60, cached=True)),
    chat("special tokens", "<|eos|><|im_end|><|pad|>"),
    chat("nul", "a\x00b"),
    chat("spaces", "   \n\t "),
    chat("empty", ""),
]

BAD_CHATS = [
    *both(chat("bad/no messages", []), chat("bad/too long", "word " * 5000), chat("bad/unknown model", model="nobody")),
    chat("bad/messages absent", messages=ABSENT),
    chat("bad/messages null", messages=None),
    chat("bad/messages a text", messages="hello"),
    chat("bad/message a text", messages=["hello"]),
    chat("bad/role absent", [{"content": "x"}]),
    chat("bad/role unknown", [{"role": "king", "content": "x"}]),
    chat("bad/content absent", [{"role": "user"}]),
    chat("bad/content null", [{"role": "user", "content": None}]),
    chat("bad/content a number", [{"role": "user", "content": 5}]),
    chat("bad/model absent", model=ABSENT),
    chat("bad/model empty", model=""),
    chat("bad/model a number", model=5),
    chat("bad/stream a text", stream="yes"),
    chat("bad/stream_options without stream", stream_options={"include_usage": True}),
    chat("bad/ignore_eos a text", ignore_eos="yes"),
    chat("bad/image", [{"role": "user", "content": part("image_url", image_url={"url": IMAGE})}]),
    streamed(chat("bad/image", [{"role": "user", "content": part("image_url", image_url={"url": IMAGE})}])),
    chat("bad/image url", [{"role": "user", "content": part("image_url", image_url={"url": "http://127.0.0.1:9/none.png"})}]),
    chat("bad/video", [{"role": "user", "content": part("video_url", video_url={"url": "http://127.0.0.1:9/none.mp4"})}]),
    chat("bad/audio", [{"role": "user", "content": part("audio_url", audio_url={"url": "http://127.0.0.1:9/none.wav"})}]),
    chat("bad/input_audio", [{"role": "user", "content": part("input_audio", input_audio={"data": "AA==", "format": "wav"})}]),
    chat("bad/part", [{"role": "user", "content": part("smell", smell="roses")}]),
    chat("bad/modalities", modalities=["text", "audio"]),
]

COMPLETIONS_IN = [
    *both(
        completion("ids", [20, 30, 40, 50]),
        completion("ids/special", [1, 3, 20, 4, 2]),
        completion("list of one", [TEXT]),
        completion("list of three", ["one", "two", "three"]),
        completion("list of ids", [[20, 30], [40, 50, 60]]),
        completion("unicode", EMOJI, ignore_eos=True, max_tokens=24),
        completion("alias", model=ALIAS),
        completion("list with n 2", ["one", "two"], n=2, temperature=1.0, top_k=1),
    ),
    completion("long", list(range(10, 290)) * 3),
    completion("long again", list(range(10, 290)) * 3, cached=True),
    streamed(completion("long again", list(range(10, 290)) * 3, cached=True)),
    completion("suffix", suffix=" end"),
    completion("suffix empty", suffix=""),
    completion("one id", [20]),
    completion("last id", [LAST_ID]),
    completion("nul", "a\x00b"),
]

BAD_COMPLETIONS = [
    completion("bad/prompt absent", prompt=ABSENT),
    completion("bad/prompt null", None),
    completion("bad/prompt empty", ""),
    completion("bad/prompt empty list", []),
    completion("bad/prompt list of empty", [[]]),
    completion("bad/prompt list with an empty text", ["one", ""]),
    completion("bad/prompt a number", 5),
    completion("bad/prompt mixed", ["one", [2]]),
    completion("bad/prompt mixed ids", [20, "a"]),
    completion("bad/prompt object", {"text": "one"}),
    completion("bad/id of no token", [99_999]),
    streamed(completion("bad/id of no token", [99_999])),
    completion("bad/id next to the last", [LAST_ID + 1]),
    completion("bad/id negative", [-1]),
    completion("bad/id 2**31", [2**31]),
    completion("bad/id 2**32", [2**32]),
    completion("bad/id a fraction", [1.5]),
    completion("bad/id a truth", [True]),
    *both(completion("bad/too long", [5] * 4096, max_tokens=8)),
    completion("bad/far too long", [5] * 20_000, max_tokens=8),
    # The frontend ends the good one a millisecond after it began: often, so that an end that is lost would show at the stop.
    *(completion(f"bad/one in a list too long, time {time}", [[5] * 3, [5] * 5000], max_tokens=8) for time in range(1, 13)),
    completion("bad/unknown model", model="nobody"),
    completion("bad/n with best_of", n=3, best_of=2),
    completion("bad/prompt_embeds", prompt_embeds="AAAA"),
]

RAW: list[tuple[str, str]] = [
    ("nothing", ""),
    ("no json", "{"),
    ("a list", "[]"),
    ("a text", '"x"'),
    ("null", "null"),
    ("nan", '{"model": "demo", "prompt": "x", "temperature": NaN}'),
    ("twice the same key", '{"model": "demo", "model": "demo", "prompt": "x", "max_tokens": 2, "temperature": 0}'),
    ("broken utf-16", '{"model": "demo", "prompt": "\\ud800", "max_tokens": 2, "temperature": 0}'),
]

PATHS = [
    Case("path/models", "/v1/models", None),
    Case("path/model", f"/v1/models/{MODEL}", None),
    Case("path/model of none", "/v1/models/nobody", None),
    Case("path/embeddings", "/v1/embeddings", {"model": MODEL, "input": "x"}),
    Case("path/rerank", "/v1/rerank", {"model": MODEL, "query": "x", "documents": ["y", "z"]}),
    Case("path/classify", "/v1/classify", {"model": MODEL, "input": "x"}),
    Case("path/images", "/v1/images/generations", {"model": MODEL, "prompt": "x"}),
    Case("path/of none", "/v1/nothing", {"model": MODEL}),
    Case("path/chat by GET", CHAT, None),
    Case("path/tokenize", "/v1/tokenize", {"model": MODEL, "prompt": TEXT}),
    Case("path/detokenize", "/v1/detokenize", {"model": MODEL, "tokens": [20, 30]}),
]

CASES: list[Case] = [
    *CHATS,
    *BAD_CHATS,
    *COMPLETIONS_IN,
    *BAD_COMPLETIONS,
    *(Case(f"raw/chat {name}", CHAT, body) for name, body in RAW),
    *(Case(f"raw/completion {name}", COMPLETIONS, body) for name, body in RAW),
    *PATHS,
]
