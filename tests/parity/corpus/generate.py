"""SGLang's own generate API as the frontend offers it: the body passes to the engine as it is."""

from typing import Any

from tests.parity.case import Case, Compare
from tests.parity.configurations import MODEL
from tests.parity.corpus.build import STOP_IDS, chat
from tests.parity.corpus.guided import GRAMMAR, SCHEMA

PATH = "/generate"
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
IDS = [20, 30, 40, 50]


def native(
    name: str, given: Any = IDS, *, compare: Compare = "exact", cached: bool = False, wanted: int | None = None, **options: Any
) -> Case:
    body = {"model": MODEL, "input_ids": given, "sampling_params": GREEDY, "stream": True, **options}
    body = {key: value for key, value in body.items() if value != "absent"}
    return Case(f"generate/{name}", PATH, body, compare, cached, wanted=wanted)


def params(**more: Any) -> dict[str, Any]:
    return {**GREEDY, **more}


CASES: list[Case] = [
    native("plain"),
    native("whole", stream=False),
    native("stream absent", stream="absent"),
    native("text", "absent", text="The quick brown fox"),
    native("without model", model="absent"),
    native("unknown model", model="nobody"),
    native("rid", rid="mine"),
    native("rid list", rid=["mine"]),
    native("empty", []),
    native("input absent", "absent"),
    native("batch", [[20, 30], [40, 50]]),
    native("id negative", [-1]),
    native("ids texts", ["a"]),
    native("too long", [5] * 5000),
    native("long", [20, 30, 40, 50, 60, 70, 80, 90] * 20),
    native("long again", [20, 30, 40, 50, 60, 70, 80, 90] * 20, cached=True),
    native("logprobs", return_logprob=True, top_logprobs_num=2),
    native("logprobs of the prompt", return_logprob=True, logprob_start_len=0),
    native("logprobs with text", return_logprob=True, return_text_in_logprobs=True),
    native("token_ids_logprob", return_logprob=True, token_ids_logprob=[20, 30]),
    native("hidden states", return_hidden_states=True),
    native("eos", sampling_params={"temperature": 0, "max_new_tokens": 100}),
    native("stop", sampling_params=params(stop=["o", "e"], max_new_tokens=40, ignore_eos=False)),
    native("stop_token_ids", sampling_params=params(stop_token_ids=STOP_IDS, max_new_tokens=40)),
    native(
        "json_schema",
        sampling_params=params(json_schema=str(SCHEMA).replace("'", '"').replace("False", "false"), max_new_tokens=40),
    ),
    native("regex", sampling_params=params(regex="[ab]{3}", ignore_eos=False)),
    native("regex bad", sampling_params=params(regex="([")),
    native("ebnf", sampling_params=params(ebnf=GRAMMAR, ignore_eos=False)),
    native("n 2", sampling_params=params(n=2)),
    native("temperature negative", sampling_params=params(temperature=-1)),
    native("top_p 7", sampling_params=params(top_p=7)),
    native("max_new_tokens 0", sampling_params=params(max_new_tokens=0)),
    native("max_new_tokens negative", sampling_params=params(max_new_tokens=-1)),
    native("max_new_tokens huge", sampling_params=params(max_new_tokens=10**6)),
    native("unknown parameter", sampling_params=params(nothing=1)),
    native("parameters a list", sampling_params=[GREEDY]),
    native("parameters a text", sampling_params="x"),
    native("parameters absent", sampling_params="absent", compare="status"),
    native("drawn", sampling_params=params(temperature=1.0), compare="shape"),
    native("penalties", sampling_params=params(frequency_penalty=1.0, presence_penalty=0.5)),
    native("custom parameters", sampling_params=params(custom_params={"a": 1})),
    native("priority", priority=3),
    native("cache_salt", cache_salt="a"),
    native("cache_salt number", cache_salt=5),
    native("session", session_params={"id": "none"}),
    native("unknown option", nothing=1),
    native("lora", lora_path="none"),
    native("image", image_data="http://127.0.0.1:9/none.png"),
    native("data_parallel_rank", data_parallel_rank=0),
    native("bootstrap", bootstrap_host="127.0.0.1", bootstrap_port=1, bootstrap_room=1),
    Case("generate/no json", PATH, "{"),
    Case("generate/vllm's", "/inference/v1/generate", {"model": MODEL, "token_ids": IDS, "sampling_params": {}}),
]

LAST: list[Case] = [
    native("id of no token", [99_999], wanted=400),
    native("after an id of no token", wanted=200),
    chat("after an id of no token", wanted=200),
]
