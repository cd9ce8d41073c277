"""SGLang's TokenizerManager with outputs taken by the step: no task of a request wakes up for its tokens, only for its end.

Everything else is SGLang's own: how a request is checked, tokenised and submitted, its locks, adapters, metrics and logs.
Imports SGLang: only the engine's process may.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from sglang.srt.entrypoints.engine import Engine, init_tokenizer_manager
from sglang.srt.managers.io_struct import BatchTokenIDOutput, hook_custom_types
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.utils import TypeBasedDispatcher

from procs.engine.adapter.direct import ROUTE, NewTokens
from procs.engine.adapter.reader import Reader


class _End(asyncio.Event):
    """A request's event, which its task waits for: set at the end only, whatever in SGLang finds that the end has come."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self._state = state

    def set(self) -> None:
        if self._state is None or self._state.finished:
            self._state = None  # they hold each other: nothing of the request should wait for the garbage collector
            super().set()


@dataclass(slots=True)
class _Row:
    """What SGLang's ``collect_metrics`` reads of a step's row that goes on."""

    completion_tokens: list[int]
    finished_reasons: tuple[None] = (None,)


class StepManager(TokenizerManager):  # type: ignore[misc]
    """Requests with an entry in ``readers`` (before they are submitted) yield their last answer only; the others as ever."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.readers: dict[str, Reader] = {}
        self.step: Callable[[Iterable[tuple[str, list[int]]]], None] = lambda rows: None
        """Takes the plain tokens of a step: request id and new ids."""
        self.from_detokenizer = 0
        """Batches that SGLang's detokenizer has given back."""
        super().__init__(*args, **kwargs)

    def init_request_dispatcher(self) -> None:
        super().init_request_dispatcher()
        hook_custom_types(NewTokens)
        self._result_dispatcher += TypeBasedDispatcher([(NewTokens, self._new_tokens)])

    def _init_req_state(self, obj: Any, *args: Any, **kwargs: Any) -> None:
        super()._init_req_state(obj, *args, **kwargs)
        # The samples of one request don't say what they are.
        if getattr(obj, "is_single", False) and obj.rid in self.readers:
            state = self.rid_to_state[obj.rid]
            state.event = _End(state)

    def _send_one_request(self, tokenized_obj: Any) -> Any:
        """Plain in SGLang 0.5.16, a coroutine in 0.5.23."""
        reader = self.readers.get(tokenized_obj.rid)
        if reader is not None and reader.ids_only:
            tokenized_obj.http_worker_ipc = ROUTE
        return super()._send_one_request(tokenized_obj)

    def _new_tokens(self, new: NewTokens) -> None:
        states = self.rid_to_state
        rows = []
        for rid, tokens in zip(new.rids, new.tokens, strict=True):
            state = states.get(rid)
            if state is None:  # aborted meanwhile
                continue
            # SGLang's own books: crash dumps, metrics and aborts read them.
            state.output_ids.extend(tokens)
            state.last_output_offset = len(state.output_ids)
            rows.append((rid, tokens))
            if self.enable_metrics and state.obj.log_metrics:
                self.collect_metrics(state, _Row([state.last_output_offset]), 0)
        self.step(rows)

    def _handle_abort_req(self, recv_obj: Any) -> None:
        """SGLang says the last token and the whole text of a stream again (0.5.23): it has had both."""
        state = self.rid_to_state.get(recv_obj.rid)
        super()._handle_abort_req(recv_obj)
        if state is not None and state.finished and self.incremental_streaming_output and getattr(state.obj, "stream", False):
            state.out_list[-1].update(output_ids=[], text="")

    async def _handle_batch_output(self, recv_obj: Any) -> None:
        if recv_obj.rids and not isinstance(recv_obj, BatchTokenIDOutput):
            self.from_detokenizer += 1
        await super()._handle_batch_output(recv_obj)
        for rid in recv_obj.rids:
            reader = self.readers.get(rid)
            state = self.rid_to_state.get(rid)
            if reader is None or state is None or state.finished or not state.out_list:
                continue
            answers, state.out_list = state.out_list, []
            if not state.time_stats.response_sent_to_client_time:
                state.time_stats.set_response_sent_to_client_time()
            if not all(map(reader.take, answers)):
                self.abort_request(rid)


def install() -> None:
    """Before the engine is built."""
    if hasattr(Engine, "init_tokenizer_manager_func"):
        Engine.init_tokenizer_manager_func = staticmethod(partial(init_tokenizer_manager, TokenizerManagerClass=StepManager))
    else:
        logging.warning("this SGLang has no Engine.init_tokenizer_manager_func: its tokens are taken one by one")
