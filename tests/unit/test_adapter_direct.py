"""Tokens past the detokenizer: what a scheduler's step is split into, where each part goes, and how it reaches the sink."""

import asyncio
import copy
import gc
import weakref
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers import io_struct
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from procs.engine.adapter import direct
from procs.engine.adapter.direct import ROUTE, NewTokens, split
from procs.engine.adapter.manager import StepManager, _End
from procs.engine.adapter.reader import Reader
from shared.errors import Code

RID = "a" * 32


def req(rid: str = RID, *ids: int, sent: int = 1, **more: Any) -> Any:
    """A request in SGLang's scheduler (0.5.23, schedule_batch.Req)."""
    params = SimpleNamespace(stop_strs=[], stream_interval=None)
    asked = {"return_logprob": False, "return_hidden_states": False, "return_routed_experts": False, "return_indexer_topk": False}
    plain = {**asked, "return_sampling_mask": False, "customized_info": None, "beam_group": None, "stream": True}
    life = {"finished_reason": None, "send_token_offset": sent, "sampling_params": params, "http_worker_ipc": ROUTE}
    return SimpleNamespace(rid=rid, output_ids=array("q", ids), **{**plain, **life, **more})


def test_what_lies_between_the_first_and_the_last_row_is_only_ids() -> None:
    one, several = req("1" * 32, 7, 8), req("2" * 32, 7, 8, 9, 10, sent=2)
    new, rest = split([one, several], 1)
    assert new == NewTokens(["1" * 32, "2" * 32], [[8], [9, 10]]) and not rest
    assert (one.send_token_offset, several.send_token_offset) == (2, 4), "the next step goes on there"
    assert split([one, several], 1) == (NewTokens([], []), []), "nothing is new"


@pytest.mark.parametrize(
    "more",
    [
        {"sent": 0},
        {"finished_reason": object()},
        {"return_logprob": True},
        {"return_hidden_states": "last"},
        {"return_routed_experts": True},
        {"return_indexer_topk": True},
        {"return_sampling_mask": True},
        {"customized_info": {}},
        {"stream": False},
        {"beam_group": object()},
        {"sampling_params": SimpleNamespace(stop_strs=["END"], stream_interval=None)},
    ],
)
def test_everything_else_is_sglangs_own(more: dict[str, Any]) -> None:
    request = req(RID, 7, 8, **more)
    before = request.send_token_offset
    assert split([request], 1) == (NewTokens([], []), [request])
    assert request.send_token_offset == before


def test_a_stream_interval_is_kept_the_servers_or_the_requests() -> None:
    request = req(RID, *range(10))
    assert split([request], 20)[0].rids == []
    request.output_ids.extend(range(11))
    assert split([request], 20)[0].tokens == [[*range(1, 10), *range(11)]]
    own = req(RID, 7, 8, 9, sampling_params=SimpleNamespace(stop_strs=[], stream_interval=2))
    assert split([own], 20)[0].tokens == [[8, 9]]


def test_the_request_that_a_step_leaves_out_is_left_out() -> None:
    request = req(RID, 7, 8)
    assert split([request], 1, request)[0].rids == [] and request.send_token_offset == 1


class Sender:
    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send_output(self, output: Any) -> None:
        self.sent.append(output)


class Streamer:
    """SGLang's SchedulerOutputStreamer: sends one batch of the requests that it is given."""

    def __init__(self, sender: Sender) -> None:
        self.send_to_detokenizer = sender

    def _stream_output_generation(self, reqs: list[Any], logprob: bool, skip: Any = None, is_idle_batch: bool = False) -> None:
        if reqs or is_idle_batch:
            self.send_to_detokenizer.send_output([each.rid for each in reqs])


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(Streamer, "_stream_output_generation", Streamer._stream_output_generation)
    detokenizer, manager = Sender(), Sender()
    channels = SimpleNamespace(send_to_detokenizer=detokenizer, send_to_tokenizer=manager)
    yield SimpleNamespace(output_streamer=Streamer(detokenizer), ipc_channels=channels, stream_interval=1)


def test_only_those_go_directly_that_ask_for_it(scheduler: Any) -> None:
    direct.install(scheduler)
    first, middle, last = req("1" * 32, 5, sent=0), req("2" * 32, 5, 6), req("3" * 32, 5, 6, finished_reason=object())
    text = req("4" * 32, 5, 6, http_worker_ipc=None)
    scheduler.output_streamer._stream_output_generation([first, text, middle, last], False)
    assert scheduler.ipc_channels.send_to_tokenizer.sent == [NewTokens(["2" * 32], [[6]]), ["1" * 32, "3" * 32]]
    assert scheduler.ipc_channels.send_to_detokenizer.sent == [["4" * 32]]


def test_an_idle_batch_is_sent_as_ever(scheduler: Any) -> None:
    direct.install(scheduler)
    scheduler.output_streamer._stream_output_generation([], False, is_idle_batch=True)
    scheduler.output_streamer._stream_output_generation([req(RID, 5, 6)], False, is_idle_batch=True)
    assert scheduler.ipc_channels.send_to_detokenizer.sent == [[], []]
    assert scheduler.ipc_channels.send_to_tokenizer.sent == [NewTokens([RID], [[6]])]


def test_each_scheduler_of_a_process_has_its_own_way(scheduler: Any) -> None:
    channels = SimpleNamespace(send_to_detokenizer=Sender(), send_to_tokenizer=Sender())
    second = SimpleNamespace(output_streamer=Streamer(channels.send_to_detokenizer), ipc_channels=channels, stream_interval=1)
    for each in (scheduler, second):
        direct.install(each)
    for each, rid in ((scheduler, "1" * 32), (second, "2" * 32)):
        each.output_streamer._stream_output_generation([req(rid, 5, 6), req(rid, 5, sent=0)], False)
    assert scheduler.ipc_channels.send_to_tokenizer.sent == [NewTokens(["1" * 32], [[6]]), ["1" * 32]]
    assert channels.send_to_tokenizer.sent == [NewTokens(["2" * 32], [[6]]), ["2" * 32]]


def test_an_sglang_that_is_built_differently_is_left_as_it_is(scheduler: Any) -> None:
    del scheduler.ipc_channels.send_to_tokenizer
    with pytest.raises(AttributeError):
        direct.install(scheduler)
    scheduler.output_streamer._stream_output_generation([req(RID, 5, 6)], False)
    assert scheduler.ipc_channels.send_to_detokenizer.sent == [[RID]]


class Sink:
    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def output(self, *what: Any) -> None:
        self.said.append(what)

    def failed(self, *what: Any) -> None:
        self.said.append(what)

    def step(self, rows: Any) -> None:
        self.said.extend(rows)


class Scene:
    """A StepManager without the sockets that its constructor opens."""

    def __init__(self) -> None:
        self.sink = Sink()
        self.manager: Any = StepManager.__new__(StepManager)
        self.manager.__dict__.update(readers={}, from_detokenizer=0, rid_to_state={}, enable_metrics=False, step=self.sink.step)

    def state(self, rid: str = RID) -> Any:
        stats = SimpleNamespace(response_sent_to_client_time=0.0)
        stats.set_response_sent_to_client_time = lambda: setattr(stats, "response_sent_to_client_time", 1.0)
        obj = SimpleNamespace(log_metrics=True)
        state = SimpleNamespace(output_ids=[], last_output_offset=0, finished=False, out_list=[], time_stats=stats, obj=obj)
        self.manager.rid_to_state[rid] = state
        return state

    def read(self, rid: str = RID, call: str = "generate") -> Reader:
        reader = Reader(rid, call, self.sink, ids_only=call == "generate")  # type: ignore[arg-type]
        self.manager.readers[rid] = reader
        return reader


def answer(*ids: int, finish: Any = None, **more: Any) -> dict[str, Any]:
    info = {"prompt_tokens": 1, "completion_tokens": len(ids), "cached_tokens": 0, "finish_reason": finish}
    return {"output_ids": list(ids), "meta_info": info, **more}


def test_new_tokens_travel_as_sglangs_own_messages_do() -> None:
    io_struct.hook_custom_types(NewTokens)
    new = NewTokens([RID], [[1, 2, 300_000]])
    assert io_struct.msgpack_decode(io_struct.msgpack_encode(new)) == new


def test_a_step_reaches_the_sink_in_one_call_and_sglangs_books() -> None:
    scene = Scene()
    state = scene.state()
    scene.manager._new_tokens(NewTokens([RID, "b" * 32], [[5], [6]]))
    scene.manager._new_tokens(NewTokens([RID], [[7, 8]]))
    assert scene.sink.said == [(RID, [5]), (RID, [7, 8])], "what was aborted meanwhile is nobody's"
    assert state.output_ids == [5, 7, 8] and state.last_output_offset == 3


def test_sglangs_metrics_count_each_step() -> None:
    scene = Scene()
    scene.state()
    seen = []
    scene.manager.enable_metrics = True
    scene.manager.collect_metrics = lambda state, row, i: seen.append((row.completion_tokens[i], row.finished_reasons[i]))
    scene.manager._new_tokens(NewTokens([RID], [[5]]))
    scene.manager._new_tokens(NewTokens([RID], [[6, 7]]))
    assert seen == [(1, None), (3, None)]


def test_answers_that_sglang_builds_are_passed_on_by_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    state = scene.state()
    other = scene.state("b" * 32)
    scene.read()

    async def handled(self: Any, batch: Any) -> None:
        for rid in batch.rids:
            self.rid_to_state[rid].out_list.append(answer(5))

    monkeypatch.setattr(TokenizerManager, "_handle_batch_output", handled)
    asyncio.run(scene.manager._handle_batch_output(SimpleNamespace(rids=[RID, "b" * 32])))
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0}
    assert scene.sink.said == [(RID, [5], None, usage, None)] and not state.out_list
    assert other.out_list == [answer(5)], "this one has no reader: its task takes it"
    assert state.time_stats.response_sent_to_client_time == 1.0
    state.finished = True
    asyncio.run(scene.manager._handle_batch_output(SimpleNamespace(rids=[RID])))
    assert len(scene.sink.said) == 1 and state.out_list == [answer(5)], "the last one is its task's"


def test_a_task_waits_for_the_end_only_whatever_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        scene = Scene()
        scene.read()

        def make(self: Any, obj: Any, request: Any = None) -> None:
            scene.state(obj.rid).event = asyncio.Event()

        monkeypatch.setattr(TokenizerManager, "_init_req_state", make)
        for rid in (RID, "b" * 32):
            scene.manager._init_req_state(SimpleNamespace(rid=rid, is_single=True))
        ours, other = scene.manager.rid_to_state[RID], scene.manager.rid_to_state["b" * 32]
        ours.event.set()
        other.event.set()
        assert not ours.event.is_set() and other.event.is_set()
        ours.finished = True
        ours.event.set()
        assert ours.event.is_set()

    asyncio.run(main())


def test_samples_that_sglang_makes_of_one_request_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    scene.read()
    monkeypatch.setattr(TokenizerManager, "_init_req_state", lambda *_: None)
    whole = io_struct.GenerateReqInput(input_ids=[1, 2], sampling_params={"n": 2}, rid=RID, stream=True)
    whole.normalize_batch_and_arguments()
    for request in (whole, copy.copy(whole[0])):  # 0.5.23, TokenizerManager._handle_batch_request
        scene.manager._init_req_state(request)


def test_a_request_that_has_ended_is_not_kept() -> None:
    class State:
        finished = False
        event: Any

    state = State()
    state.event = _End(state)
    gone = weakref.ref(state)
    gc.disable()
    try:
        state.event.set()
        assert not state.event.is_set()
        state.finished = True
        state.event.set()
        del state
        assert gone() is None
    finally:
        gc.enable()


def test_an_abort_out_of_the_queue_says_no_token_again() -> None:
    async def main() -> None:
        scene = Scene()
        reader = scene.read()
        nothing = SimpleNamespace(log_finished_request=lambda *_, **__: None, exporter_enabled=lambda: False)
        scene.manager.__dict__.update(
            enable_trace=False, enable_lora=False, incremental_streaming_output=True, disaggregation_mode=None,
            config_value=lambda _: "", request_logger=nothing, request_metrics_exporter_manager=nothing,
            server_args=SimpleNamespace(weight_version=""),
        )  # fmt: skip
        request = io_struct.GenerateReqInput(input_ids=[1], sampling_params={}, rid=RID, stream=True)
        request.normalize_batch_and_arguments()
        scene.manager._init_req_state(request)
        scene.manager.rid_to_state[RID].append_text("ab")
        answers = scene.manager._wait_one_response(request)
        scene.manager._new_tokens(NewTokens([RID], [[5]]))
        scene.manager._handle_abort_req(io_struct.AbortReq(rid=RID))  # 0.5.23: it was retracted, and waits
        (last,) = [each async for each in answers]
        reader.pass_on(last)
        assert scene.sink.said[0] == (RID, [5]) and scene.sink.said[1][1] == [] and last["text"] == ""
        assert reader.finished and not scene.manager.rid_to_state

    asyncio.run(main())


@pytest.mark.parametrize(("call", "route"), [("generate", ROUTE), ("text", None)])
def test_only_a_request_without_text_asks_for_the_direct_way(
    monkeypatch: pytest.MonkeyPatch, call: str, route: str | None
) -> None:
    scene = Scene()
    scene.read(call=call)
    sent = []
    monkeypatch.setattr(TokenizerManager, "_send_one_request", lambda self, obj: sent.append(obj))
    for rid in (RID, "b" * 32):
        scene.manager._send_one_request(SimpleNamespace(rid=rid, http_worker_ipc=None))
    assert [obj.http_worker_ipc for obj in sent] == [route, None]


def test_an_answer_that_makes_no_sense_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, other = Scene(), "b" * 32
    aborted: list[str] = []
    scene.manager.abort_request = aborted.append
    for rid, made in ((RID, {"output_ids": [5], "meta_info": {}}), (other, answer(6))):
        scene.read(rid)
        scene.state(rid).out_list.append(made)

    async def handled(self: Any, batch: Any) -> None: ...

    monkeypatch.setattr(TokenizerManager, "_handle_batch_output", handled)
    asyncio.run(scene.manager._handle_batch_output(SimpleNamespace(rids=[RID, other])))
    assert scene.sink.said[0] == (RID, Code.INTERNAL, "KeyError: 'finish_reason'")
    assert scene.sink.said[1][:2] == (other, [6]) and aborted == [RID], "SGLang doesn't go on with it"


def test_text_goes_along_where_it_was_asked_for() -> None:
    scene = Scene()
    reader = scene.read(call="text")
    reader.take(answer(5, text="a"))
    reader.take(answer(text="", finish=None))
    reader.take(answer(6, text="b", finish={"type": "stop"}))
    assert [said[4] for said in scene.sink.said] == ["a", "b"] and reader.finished
