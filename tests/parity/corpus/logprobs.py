"""Log probabilities of the answer and of the prompt, echo, and how tokens are named."""

from tests.parity.case import Case
from tests.parity.corpus.build import ENDS_SOON, ENDS_SOON_IDS, STOP_IDS, both, chat, completion, streamed

IDS = {"return_tokens_as_token_ids": True}

CASES: list[Case] = [
    *both(
        chat("logprobs/without top", logprobs=True),
        chat("logprobs/top 0", logprobs=True, top_logprobs=0),
        chat("logprobs/top 3", logprobs=True, top_logprobs=3),
        chat("logprobs/top 20", logprobs=True, top_logprobs=20, max_tokens=3),
        chat("logprobs/by id", logprobs=True, top_logprobs=2, **IDS),
        chat("logprobs/n 2", logprobs=True, top_logprobs=1, n=2, temperature=1.0, top_k=1),
        chat("logprobs/to eos", ENDS_SOON, logprobs=True, top_logprobs=2, max_tokens=100),
        chat("logprobs/with stop", logprobs=True, stop=["o", "e", "a"], max_tokens=40),
        chat("logprobs/multibyte", "日本語 🙂", logprobs=True, top_logprobs=1, max_tokens=24, ignore_eos=True),
        completion("logprobs/0", logprobs=0),
        completion("logprobs/1", logprobs=1),
        completion("logprobs/5", logprobs=5),
        completion("logprobs/by id", logprobs=2, **IDS),
        completion("logprobs/0 by id", logprobs=0, **IDS),
        completion("logprobs/n 2", logprobs=1, n=2, temperature=1.0, top_k=1),
        completion("logprobs/with stop ids", logprobs=1, stop_token_ids=STOP_IDS, max_tokens=40),
        completion("echo/plain", echo=True),
        completion("echo/with logprobs", echo=True, logprobs=2),
        completion("prompt_logprobs/0", prompt_logprobs=0),
        completion("prompt_logprobs/2", prompt_logprobs=2),
        completion("prompt_logprobs/with logprobs", prompt_logprobs=1, logprobs=1),
        chat("prompt_logprobs/1", prompt_logprobs=1),
    ),
    chat("logprobs/false with top", logprobs=False, top_logprobs=3),
    chat("logprobs/top without logprobs", top_logprobs=3),
    chat("logprobs/top 21", logprobs=True, top_logprobs=21),
    chat("logprobs/top -1", logprobs=True, top_logprobs=-1),
    chat("logprobs/a number", logprobs=3),
    completion("logprobs/6", logprobs=6),
    completion("logprobs/-1", logprobs=-1),
    completion("logprobs/true", logprobs=True),
    completion("prompt_logprobs/-1", prompt_logprobs=-1),
    completion("prompt_logprobs/text", prompt_logprobs="all"),
    completion("prompt_logprobs/of a cached prompt", "The quick brown fox jumps over the lazy dog. " * 4, prompt_logprobs=1),
    completion("prompt_logprobs/again", "The quick brown fox jumps over the lazy dog. " * 4, prompt_logprobs=1),
    completion("echo/max_tokens 0", echo=True, max_tokens=0),
    completion("echo/ids", [20, 30, 40], echo=True),
    completion("echo/list", ["one", "two"], echo=True),
    streamed(completion("logprobs/list", ["one", "two"], logprobs=1)),
    completion("logprobs/list", ["one", "two"], logprobs=1),
    chat("special tokens/kept", ENDS_SOON, max_tokens=99, skip_special_tokens=False),
    chat("special tokens/skipped", ENDS_SOON, max_tokens=100, skip_special_tokens=True),
    completion("special tokens/kept", ENDS_SOON_IDS, max_tokens=99, skip_special_tokens=False),
    completion("special tokens/in the prompt", "<|im_start|>user\nhello<|im_end|>\n"),
    completion(
        "special tokens/stop string", ENDS_SOON_IDS, stop=["<|eos|>", "<|im_end|>"], max_tokens=100, skip_special_tokens=False
    ),
    completion("special tokens/stop ids", ENDS_SOON_IDS, stop_token_ids=[0, 1, 2, 3, 4], max_tokens=100),
]
