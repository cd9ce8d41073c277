"""The scheduler's end of the direct way: a request's outputs go to the engine's own process, not through the detokenizer.

SGLang sends every token through a process that turns it into text, in rows of some forty columns (0.5.23, output_streamer.py).
A request in token mode needs neither: its first and last rows go straight to the tokenizer manager, and what lies between is
only ids. A request asks for this by its return route, which SGLang carries along for its own tokenizer workers.
"""

import copy
from typing import Any

import msgspec

ROUTE = "sgnode:direct"
"""``http_worker_ipc`` of a request that is answered directly."""


class NewTokens(msgspec.Struct, tag="SgnodeNewTokens", array_like=True, gc=False):
    """New tokens of one scheduler step, of requests that have had their first ones and go on."""

    rids: list[str]
    tokens: list[list[int]]


def install(scheduler: Any) -> None:
    """Once, in the scheduler's process, when its model is loaded. Raises AttributeError where SGLang is built differently."""
    streamer, sender = scheduler.output_streamer, scheduler.ipc_channels.send_to_tokenizer
    if getattr(streamer, "rust_server", None) is not None:
        return
    kind = type(streamer)
    ordinary = kind._stream_output_generation
    straight = copy.copy(streamer)
    straight.send_to_detokenizer = sender
    interval = int(scheduler.stream_interval)

    def stream_output_generation(
        self: Any, reqs: list[Any], return_logprob: bool, skip_req: Any = None, is_idle_batch: bool = False
    ) -> None:
        ours = [req for req in reqs if req.http_worker_ipc == ROUTE] if self is streamer else []
        if not ours:
            ordinary(self, reqs, return_logprob, skip_req, is_idle_batch)
            return
        new, rest = split(ours, interval, skip_req)
        if new.rids:
            sender.send_output(new)
        if rest:
            ordinary(straight, rest, return_logprob, skip_req)
        if len(ours) < len(reqs) or is_idle_batch:
            others = [req for req in reqs if req.http_worker_ipc != ROUTE]
            ordinary(self, others, return_logprob, skip_req, is_idle_batch)

    kind._stream_output_generation = stream_output_generation


def split(reqs: list[Any], interval: int, skip_req: Any = None) -> tuple[NewTokens, list[Any]]:
    """What is only ids, marked as sent; and the requests that SGLang has to look at itself.

    Those are at their beginning or end, or somebody asked for more than tokens, or a stop string may be about to begin.
    """
    rids: list[str] = []
    tokens: list[list[int]] = []
    rest = []
    for req in reqs:
        sent = req.send_token_offset
        params = req.sampling_params
        if not sent or req.finished_reason is not None or params.stop_strs or more_than_tokens(req):
            rest.append(req)
            continue
        ids = req.output_ids
        count = len(ids)
        if req is not skip_req and count - sent >= (params.stream_interval or interval):
            rids.append(req.rid)
            tokens.append(list(ids[sent:]))
            req.send_token_offset = count
    return NewTokens(rids, tokens), rest


def more_than_tokens(req: Any) -> bool:
    """Its rows have columns of their own, also between the first and the last."""
    return bool(
        req.return_logprob
        or req.return_hidden_states
        or req.return_routed_experts
        or req.return_indexer_topk
        or req.return_sampling_mask
        or req.customized_info is not None
        or not req.stream
        or getattr(req, "beam_group", None) is not None
    )
