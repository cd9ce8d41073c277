"""One request's answers on their way to the sink: which of SGLang's metadata go along, and whether the end has come."""

import logging

from procs.engine.adapter.calls import Answer, meta_of
from procs.engine.backend import Sink
from shared.errors import Code

BY_THE_STEP = ("generate", "text")
"""Calls whose outputs are taken by the step (procs.engine.adapter.manager); others are answered once, or have their own ids."""


class Reader:
    """Answers of one request, in SGLang's form and in order."""

    __slots__ = ("_call", "_first", "_rid", "_sink", "finished", "ids_only")

    def __init__(self, rid: str, call: str, sink: Sink, *, ids_only: bool) -> None:
        self._rid = rid
        self._call = call
        self._sink = sink
        self._first = True
        self.finished = False
        self.ids_only = ids_only
        """Text is not asked for: the scheduler may answer directly (procs.engine.adapter.direct)."""

    def take(self, answer: Answer) -> bool:
        """As ``pass_on``; False when it can't be understood: the request has failed, and whoever made it is to abort it.

        Never raises: it is called for a whole step's requests.
        """
        try:
            self.pass_on(answer)
        except Exception as error:
            logging.exception("request %s", self._rid)
            self._sink.failed(self._rid, Code.INTERNAL, f"{type(error).__name__}: {error}")
            return False
        return True

    def pass_on(self, answer: Answer) -> None:
        finish = answer["meta_info"]["finish_reason"]
        self.finished = finish is not None
        tokens = answer.get("output_ids") or []
        if not tokens and finish is None:
            return
        text = answer.get("text") if self._call in ("text", "native") else None
        self._sink.output(self._rid, list(tokens), finish, meta_of(answer, self._call, first=self._first), text)
        self._first = False
