"""How far SGLang's load is, in its own words: it is said nowhere but in the log of its processes (0.5.23)."""

import re
from pathlib import Path

TAIL_BYTES = 16_384
STEPS = re.compile(
    rb"(?P<weights>Load weight begin)"
    rb"|shards: +(?P<percent>\d+)% Completed \| (?P<shards>\d+/\d+)"
    rb"|(?P<loaded>Load weight end)"
    rb"|(?P<pool>Memory pool end)"
    rb"|Capturing batches[^|\r\n]*: +\d+%\|[^|\r\n]*\| (?P<graphs>\d+/\d+)"
)
"""weight_utils.py, model_runner.py, kv_cache_configurator.py, decode_cuda_graph_runner.py. Other words are not found, no more."""


class LoadProgress:
    """Looks into the log from where it ends now: what is older is of an earlier load."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._from = self._size()
        self._words = ""

    def look(self) -> str:
        """The step that the load is at, as ``weights 3/8 shards``; empty as long as SGLang has said nothing."""
        size = self._size()
        if size < self._from:
            self._from = 0  # rotated
        try:
            with self._log.open("rb") as log:
                log.seek(max(self._from, size - TAIL_BYTES))
                steps = list(STEPS.finditer(log.read(TAIL_BYTES)))
        except OSError:
            return self._words
        if steps:
            self._words = _words(steps[-1])
        return self._words

    def _size(self) -> int:
        try:
            return self._log.stat().st_size
        except OSError:
            return 0


def _words(step: re.Match[bytes]) -> str:
    match step.lastgroup:
        case "shards":
            return f"weights {step['shards'].decode()} shards, {int(step['percent'])} %"
        case "loaded":
            return "weights loaded, making the KV cache"
        case "pool":
            return "KV cache made, warming up"
        case "graphs":
            return f"capturing graphs {step['graphs'].decode()}"
        case _:
            return "reading the weights"
