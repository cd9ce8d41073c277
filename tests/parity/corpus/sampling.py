"""Chat and completions: lengths, stops, sampling options, n."""

from typing import Any

from tests.parity.case import Case
from tests.parity.corpus.build import ABSENT, ENDS_SOON, ENDS_SOON_IDS, STOP_IDS, both, chat, completion, streamed

EIGHT: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
DRAWN: dict[str, Any] = {**EIGHT, "temperature": 1.0, "compare": "shape"}
"""SGLang's CPU backends follow no seed: with one, too, only the shape compares."""

SURE: dict[str, Any] = {**EIGHT, "temperature": 1.0, "top_k": 1}
"""Drawn from one candidate: the frontend refuses several samples at temperature 0."""

LENGTHS = [
    *both(chat("plain"), completion("plain"), chat("ignore_eos", **EIGHT), completion("ignore_eos", **EIGHT)),
    *(
        made
        for make in (chat, completion)
        for made in (
            make("max_tokens/absent", max_tokens=ABSENT, stop_token_ids=STOP_IDS),
            make("max_tokens/null", max_tokens=None, stop_token_ids=STOP_IDS),
            make("max_tokens/0", max_tokens=0),
            make("max_tokens/1", max_tokens=1),
            make("max_tokens/negative", max_tokens=-1),
            make("max_tokens/text", max_tokens="8"),
            make("max_tokens/fraction", max_tokens=8.5),
            make("max_tokens/beyond the context", max_tokens=100_000),
            make("max_tokens/2**32", max_tokens=2**32),
            make("min_tokens/4", min_tokens=4),
            make("min_tokens/above max_tokens", min_tokens=20, max_tokens=8),
            make("min_tokens/negative", min_tokens=-1),
            make("min_tokens/with ignore_eos", min_tokens=4, **EIGHT),
        )
    ),
    streamed(chat("max_tokens/1", max_tokens=1)),
    streamed(chat("max_tokens/0", max_tokens=0)),
    *both(chat("max_completion_tokens/5", max_tokens=ABSENT, max_completion_tokens=5, ignore_eos=True)),
    chat("max_completion_tokens/0", max_tokens=ABSENT, max_completion_tokens=0),
    chat("max_completion_tokens/beside max_tokens", max_tokens=9, max_completion_tokens=5, ignore_eos=True),
    *both(chat("until eos", ENDS_SOON, max_tokens=200), completion("until eos", ENDS_SOON_IDS, max_tokens=200)),
    chat("max_tokens/absent to eos", ENDS_SOON, max_tokens=ABSENT),
    completion("max_tokens/absent to eos", ENDS_SOON_IDS, max_tokens=ABSENT),
    completion("fills the context", [7] * 4090, max_tokens=ABSENT, ignore_eos=True),
    completion("max_tokens just fits", [9] * 4086, max_tokens=10, ignore_eos=True),
    completion("max_tokens does not fit", [9] * 4086, max_tokens=11, ignore_eos=True),
]

STOPS = [
    *both(
        chat("stop/one", stop="o", max_tokens=40),
        chat("stop/several", stop=["ab", "o", "e", " t"], max_tokens=40),
        completion("stop/one", stop="o", max_tokens=40),
        completion("stop/at once", stop=[" ", "s"], max_tokens=40),
    ),
    chat("stop/empty list", stop=[]),
    chat("stop/empty text", stop=""),
    chat("stop/empty text in list", stop=[""]),
    chat("stop/null", stop=None),
    chat("stop/five", stop=["1", "2", "3", "4", "5"]),
    chat("stop/forty", stop=[f"s{i}" for i in range(40)]),
    chat("stop/number", stop=5),
    chat("stop/numbers", stop=[5, 6]),
    chat("stop/with ignore_eos", stop="o", max_tokens=40, ignore_eos=True),
    chat("stop/included", stop="o", max_tokens=40, include_stop_str_in_output=True),
    completion("stop/included", stop="o", max_tokens=40, include_stop_str_in_output=True),
    completion("stop/with min_tokens", stop=["o", "e"], min_tokens=10, max_tokens=40),
    *both(
        chat("stop_token_ids/32", stop_token_ids=STOP_IDS, max_tokens=40),
        completion("stop_token_ids/32", stop_token_ids=STOP_IDS, max_tokens=40),
    ),
    completion("stop_token_ids/too many", stop_token_ids=list(range(33)), max_tokens=40),
    completion("stop_token_ids/unknown", stop_token_ids=[99_999]),
    completion("stop_token_ids/negative", stop_token_ids=[-1]),
    completion("stop_token_ids/text", stop_token_ids=["a"]),
    completion("stop_token_ids/empty", stop_token_ids=[]),
    completion("stop_token_ids/with ignore_eos", stop_token_ids=STOP_IDS, max_tokens=40, ignore_eos=True),
    completion("stop_token_ids/with min_tokens", stop_token_ids=STOP_IDS, min_tokens=10, max_tokens=40),
]

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("temperature/negative", {"temperature": -0.1}),
    ("temperature/2", {**DRAWN, "temperature": 2.0}),
    ("temperature/2.1", {"temperature": 2.1}),
    ("temperature/text", {"temperature": "hot"}),
    ("temperature/tiny", {"temperature": 1e-9}),
    ("temperature/null", {**DRAWN, "temperature": None}),
    ("temperature/absent", {**DRAWN, "temperature": ABSENT}),
    ("seed", {**DRAWN, "seed": 7}),
    ("seed/negative", {**DRAWN, "seed": -7}),
    ("seed/big", {**DRAWN, "seed": 2**63 - 1}),
    ("seed/too big", {**DRAWN, "seed": 2**64}),
    ("seed/greedy", {"seed": 7}),
    ("top_p/0.5", {**DRAWN, "top_p": 0.5}),
    ("top_p/0", {**DRAWN, "top_p": 0}),
    ("top_p/1", {"top_p": 1}),
    ("top_p/7", {"top_p": 7.0}),
    ("top_p/negative", {"top_p": -0.5}),
    ("top_k/1", {**EIGHT, "temperature": 1.0, "top_k": 1}),
    ("top_k/20", {**DRAWN, "top_k": 20}),
    ("top_k/0", {**DRAWN, "top_k": 0}),
    ("top_k/-1", {**DRAWN, "top_k": -1}),
    ("top_k/-2", {"top_k": -2}),
    ("top_k/huge", {**DRAWN, "top_k": 100_000}),
    ("min_p/0.1", {**DRAWN, "min_p": 0.1}),
    ("min_p/1", {**EIGHT, "temperature": 1.0, "min_p": 1.0}),
    ("min_p/2", {"min_p": 2.0}),
    ("min_p/negative", {"min_p": -0.5}),
    ("frequency_penalty/1", {**EIGHT, "frequency_penalty": 1.0}),
    ("frequency_penalty/-2", {**EIGHT, "frequency_penalty": -2.0}),
    ("frequency_penalty/3", {"frequency_penalty": 3.0}),
    ("presence_penalty/1", {**EIGHT, "presence_penalty": 1.0}),
    ("presence_penalty/-2.5", {"presence_penalty": -2.5}),
    ("repetition_penalty/1.5", {**EIGHT, "repetition_penalty": 1.5}),
    ("repetition_penalty/0", {"repetition_penalty": 0}),
    ("repetition_penalty/2.5", {"repetition_penalty": 2.5}),
    ("all penalties", {**EIGHT, "frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.2, "max_tokens": 24}),
    ("logit_bias", {**EIGHT, "logit_bias": {"20": 100}}),
    ("logit_bias/too big", {"logit_bias": {"20": 101}}),
    ("length_penalty", {"length_penalty": 1.5}),
    ("best_of/2", {"best_of": 2}),
    ("user", {"user": "somebody"}),
    ("metadata", {"metadata": {"a": "b"}}),
    ("service_tier", {"service_tier": "auto"}),
    ("an unknown option", {"no_such_option": 1}),
    ("n/0", {"n": 0}),
    ("n/1", {"n": 1}),
    ("n/2 greedy", {**SURE, "n": 2}),
    ("n/3 with a seed", {**DRAWN, "n": 3, "seed": 5}),
    ("n/4 drawn", {**DRAWN, "n": 4}),
    ("n/2 at temperature 0", {"n": 2}),
    ("n/129", {"n": 129}),
    ("n/text", {"n": "2"}),
]

SAMPLING = [
    *(chat(name, **options) for name, options in OPTIONS),
    *(completion(name, **options) for name, options in OPTIONS if not name.startswith(("user", "service", "metadata"))),
    *(streamed(chat(name, **options)) for name, options in OPTIONS if name.startswith("n/") and "text" not in name),
    streamed(completion("n/2 greedy", **SURE, n=2)),
    streamed(completion("n/4 drawn", **DRAWN, n=4)),
    streamed(chat("seed", **DRAWN, seed=7)),
    streamed(chat("all penalties", **dict(OPTIONS)["all penalties"])),
]

CASES: list[Case] = [*LENGTHS, *STOPS, *SAMPLING]
