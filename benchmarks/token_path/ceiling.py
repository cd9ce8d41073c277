"""The engine's own ceiling: SGLang's real schedulers, and a receiver that can be told to do nothing for a token.

Then the scheduler serialises each step as for any stream, and the receiving process unpickles it and looks at its finish
reasons. Works with SGLang 0.5.16 and 0.5.23.
"""

from functools import partial
from typing import Any

from sglang.srt.entrypoints.engine import Engine, init_tokenizer_manager
from sglang.srt.managers.tokenizer_manager import TokenizerManager


class Receiver(TokenizerManager):  # type: ignore[misc]
    """A TokenizerManager; with ``bare`` it hands on ends only, and the tokens in one piece with ``keep``, for a look at them."""

    bare = False
    keep: dict[str, list[int]] | None = None

    async def _handle_batch_output(self, recv_obj: Any) -> None:
        if not self.bare:
            await super()._handle_batch_output(recv_obj)
            return
        if self.keep is not None:
            for rid, ids in zip(recv_obj.rids, recv_obj.output_ids, strict=True):
                self.keep.setdefault(rid, []).extend(ids)
        for index, reason in enumerate(recv_obj.finished_reasons):
            if reason is not None:
                self._finished(recv_obj.rids[index], reason, recv_obj.completion_tokens[index])

    def _finished(self, rid: str, reason: dict[str, Any], tokens: int) -> None:
        state = self.rid_to_state.pop(rid, None)
        if state is None:
            return
        ids = self.keep.pop(rid, []) if self.keep is not None else []
        meta = {"id": rid, "finish_reason": reason, "completion_tokens": tokens}
        state.finished = True
        state.out_list.append({"output_ids": ids, "meta_info": meta})
        state.event.set()


class WithReceiver(Engine):  # type: ignore[misc]
    """``sgl.Engine`` with that receiver."""

    init_tokenizer_manager_func = staticmethod(partial(init_tokenizer_manager, TokenizerManagerClass=Receiver))
