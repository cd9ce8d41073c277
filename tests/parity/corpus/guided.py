"""Guided decoding: response_format, nvext's and the top level's guided options, good and bad."""

from typing import Any

from tests.parity.case import Case
from tests.parity.corpus.build import both, chat, completion, streamed

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
ENUM = {"type": "string", "enum": ["red", "green"]}
GRAMMAR = 'root ::= "yes" | "no"'
TAG = {
    "type": "structural_tag",
    "format": {"type": "tag", "begin": "<x>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</x>"},
}
OLD_TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<x>", "schema": SCHEMA, "end": "</x>"}],
    "triggers": ["<x>"],
}


def form(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, **more}}


GUIDED: list[tuple[str, dict[str, Any]]] = [
    ("json", {"guided_json": SCHEMA}),
    ("json as text", {"guided_json": '{"type": "boolean"}'}),
    ("json no schema", {"guided_json": "not a schema"}),
    ("json bad type", {"guided_json": {"type": "nonsense"}}),
    ("json a list", {"guided_json": [1, 2]}),
    ("json a number", {"guided_json": 5}),
    ("json empty", {"guided_json": {}}),
    ("regex", {"guided_regex": "[ab]{3}-[0-9]{2}"}),
    ("regex literal", {"guided_regex": "exactly this"}),
    ("regex unbalanced", {"guided_regex": "(["}),
    ("regex lookahead", {"guided_regex": "(?=a)b"}),
    ("regex empty", {"guided_regex": ""}),
    ("regex a number", {"guided_regex": 5}),
    ("choice", {"guided_choice": ["red", "green"]}),
    ("choice one", {"guided_choice": ["only"]}),
    ("choice with signs", {"guided_choice": ["a.b*c", "(d|e)", "f\\g", "hé"]}),
    ("choice empty", {"guided_choice": []}),
    ("choice of an empty text", {"guided_choice": [""]}),
    ("choice of numbers", {"guided_choice": [1, 2]}),
    ("choice a text", {"guided_choice": "red"}),
    ("grammar", {"guided_grammar": GRAMMAR}),
    ("grammar bad", {"guided_grammar": "root ::= ("}),
    ("grammar without root", {"guided_grammar": 'other ::= "yes"'}),
    ("grammar empty", {"guided_grammar": ""}),
    ("two at once", {"guided_regex": "a", "guided_choice": ["b"]}),
    ("backend", {"guided_regex": "[ab]{3}", "guided_decoding_backend": "xgrammar"}),
    ("backend other", {"guided_regex": "[ab]{3}", "guided_decoding_backend": "outlines"}),
    ("whitespace", {"guided_json": SCHEMA, "guided_whitespace_pattern": " "}),
    ("structural tag", {"structural_tag": TAG}),
]

FORMATS: list[tuple[str, Any]] = [
    ("schema", form(SCHEMA)),
    ("schema strict", form(SCHEMA, strict=True)),
    ("enum", form(ENUM)),
    ("schema bad type", form({"type": "nonsense"})),
    ("schema bad reference", form({"$ref": "#/nowhere"})),
    ("schema with pattern", form({"type": "string", "pattern": "^a{2}$"})),
    ("schema bad pattern", form({"type": "string", "pattern": "(["})),
    ("schema a text", form("text")),
    ("schema null", form(None)),
    ("schema true", form(True)),
    ("schema without name", {"type": "json_schema", "json_schema": {"schema": SCHEMA}}),
    ("schema absent", {"type": "json_schema"}),
    ("object", {"type": "json_object"}),
    ("text", {"type": "text"}),
    ("unknown", {"type": "yaml"}),
    ("a text", "json"),
    ("structural tag", TAG),
    ("structural tag of old", OLD_TAG),
]

CASES: list[Case] = [
    *(chat(f"guided/{name}", max_tokens=40, **options) for name, options in GUIDED),
    *(completion(f"guided/{name}", max_tokens=40, **options) for name, options in GUIDED),
    # Where Dynamo took them before 1.6.
    *(chat(f"guided/nvext {name}", nvext=options) for name, options in GUIDED if name in ("json", "regex", "choice", "grammar")),
    *(chat(f"response_format/{name}", max_tokens=40, response_format=value) for name, value in FORMATS),
    *both(
        chat("guided/json logprobs", max_tokens=40, guided_json=SCHEMA, logprobs=True),
        chat("guided/choice n 2", max_tokens=40, guided_choice=["red", "green"], n=2, temperature=1.0, top_k=1),
        chat("guided/json cut short", max_tokens=4, guided_json=SCHEMA),
    ),
    streamed(chat("guided/regex unbalanced", guided_regex="([")),
    streamed(chat("response_format/schema", max_tokens=40, response_format=form(SCHEMA))),
    streamed(chat("response_format/schema bad type", max_tokens=40, response_format=form({"type": "nonsense"}))),
    completion("response_format/schema", max_tokens=40, response_format=form(SCHEMA)),
]
