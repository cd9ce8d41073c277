"""How far SGLang's load is, in its own words: it is said nowhere but in the log of its processes (0.5.23)."""

import re
import time
from pathlib import Path

from shared import logs

TAIL_BYTES = 262_144
"""Of what came since the last look: the arguments alone are two lines of 10 KB."""
STEPS = re.compile(
    rb"(?P<imported>server_args=)"
    rb"|(?P<children>Init parallel begin)"
    rb"|(?P<weights>Load weight begin)"
    rb"|shards: +(?P<percent>\d+)% Completed \| (?P<shards>\d+/\d+)"
    rb"|(?P<loaded>Load weight end)"
    rb"|(?P<pool>Memory pool end)"
    rb"|Capturing batches[^|\r\n]*: +\d+%\|[^|\r\n]*\| (?P<graphs>\d+/\d+)"
    rb"|Capture [^\r\n]{0,60} graph (?P<captured>end)"
)
"""engine.py, weight_utils.py, model_runner.py, kv_cache_configurator.py, decode_cuda_graph_runner.py, cuda_graph_setup.py.

Other words are not found, no more.
"""
MARKS = ("imported", "children", "weights", "loaded", "pool", "captured")


class LoadProgress:
    """Looks into the log from where it ends now: what is older is of an earlier load."""

    def __init__(self, log: Path, marks: dict[str, float]) -> None:
        """``marks`` gets UNIX seconds by MARKS: of the first rank to come so far, of the last graphs."""
        self._log = log
        self._marks = marks
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
                text = log.read(TAIL_BYTES)
                whole = max(text.rfind(b"\n"), text.rfind(b"\r")) + 1
                self._from = log.tell() - len(text) + whole
        except OSError:
            return self._words
        for step in STEPS.finditer(text[:whole]):
            self._words = _words(step) or self._words
            if (name := step.lastgroup) in MARKS:
                self._mark(str(name), text[text.rfind(b"\n", 0, step.start()) + 1 : step.start()])
        return self._words

    def _mark(self, name: str, line: bytes) -> None:
        if name not in self._marks or name == "captured":
            self._marks[name] = logs.time_of(line) or time.time()

    def _size(self) -> int:
        try:
            return self._log.stat().st_size
        except OSError:
            return 0


def _words(step: re.Match[bytes]) -> str:
    match step.lastgroup:
        case "imported":
            return "starting SGLang's processes"
        case "children":
            return "connecting SGLang's processes"
        case "weights":
            return "reading the weights"
        case "shards":
            return f"weights {step['shards'].decode()} shards, {int(step['percent'])} %"
        case "loaded":
            return "weights loaded, making the KV cache"
        case "pool":
            return "KV cache made, warming up"
        case "graphs":
            return f"capturing graphs {step['graphs'].decode()}"
    return ""
