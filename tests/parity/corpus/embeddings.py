"""The embeddings API on an embedding worker."""

from typing import Any

from tests.parity.case import Case
from tests.parity.configurations import MODEL
from tests.parity.corpus.build import TEXT, chat

PATH = "/v1/embeddings"


def embedding(name: str, given: Any = TEXT, **options: Any) -> Case:
    wanted = options.pop("wanted", None)
    body = {"model": MODEL, "input": given, **options}
    return Case(f"embedding/{name}", PATH, {key: value for key, value in body.items() if value != "absent"}, wanted=wanted)


CASES: list[Case] = [
    embedding("text"),
    embedding("text again"),
    embedding("list", ["one", "two", "three"]),
    embedding("ids", [20, 30, 40]),
    embedding("lists of ids", [[20, 30], [40, 50, 60]]),
    embedding("unicode", "naïve 日本語 🙂"),
    embedding("float", encoding_format="float"),
    embedding("base64", encoding_format="base64"),
    embedding("base64 list", ["one", "two"], encoding_format="base64"),
    embedding("format unknown", encoding_format="hex"),
    embedding("dimensions 16", dimensions=16),
    embedding("dimensions 64", dimensions=64),
    embedding("dimensions 0", dimensions=0),
    embedding("dimensions 65", dimensions=65),
    embedding("dimensions text", dimensions="16"),
    embedding("user", user="somebody"),
    embedding("empty list", []),
    embedding("input absent", "absent"),
    embedding("input null", None),
    embedding("input a number", 5),
    embedding("mixed", ["one", 2]),
    embedding("id negative", [-1]),
    embedding("too long", [5] * 5000),
    embedding("too long text", "word " * 5000),
    embedding("one of a list too long", [[5, 6], [5] * 5000]),
    embedding("long", "One token after another. " * 50),
    embedding("long again", "One token after another. " * 50),
    embedding("forty", [f"text {i}" for i in range(40)]),
    embedding("unknown model", model="nobody"),
    embedding("unknown option", nothing=1),
    embedding("nvext", nvext={"annotations": ["token_ids"]}),
    Case("embedding/no json", PATH, "{"),
    Case("embedding/models", "/v1/models", None),
    chat("of an embedding model"),
    Case("rerank/of an embedding model", "/v1/rerank", {"model": MODEL, "query": "x", "documents": ["y", "z"]}),
]

LAST: list[Case] = [
    embedding("empty text", "", wanted=400),
    embedding("list with an empty text", ["one", ""], wanted=400),
    embedding("list of empty ids", [[]], wanted=400),
    embedding("id of no token", [99_999], wanted=400),
    embedding("after them", wanted=200),
]
