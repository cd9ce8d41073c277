"""The recorded set: a fixed list of requests a configuration, in the order in which both sides get them."""

from tests.parity.case import Case
from tests.parity.corpus import embeddings, generate, guided, inputs, logprobs, media, nvext, responses, sampling, text, tools

CORPUS: dict[str, list[Case]] = {
    # Inputs first: the first requests of a fresh cache are those that ask what is cached.
    "main": [
        *inputs.CASES,
        *sampling.CASES,
        *logprobs.CASES,
        *guided.CASES,
        *nvext.CASES,
        *responses.CASES,
        *generate.CASES,
        # What dynamo.sglang's engine dies of: nothing that it should answer comes after.
        *generate.LAST,
    ],
    "parsers": tools.CASES,
    "embedding": [*embeddings.CASES, *embeddings.LAST],
    "text": text.CASES,
    "media": media.CASES,
}

for _configuration, _cases in CORPUS.items():
    _names = [case.name for case in _cases]
    assert len(_names) == len(set(_names)), (_configuration, sorted({name for name in _names if _names.count(name) > 1}))
