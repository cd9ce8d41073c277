"""Wild Dynamo requests for every role: only typed failures, never a hung request, nothing left in any table."""

import asyncio
import copy
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from dynamo.llm.exceptions import CannotConnect, Disconnected, EngineShutdown, HttpError, InvalidArgument
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from procs.agent.callee import Callees
from procs.agent.handler import Handler
from procs.engine.service import Service
from shared import sockets
from shared.engine_client import EngineClient
from shared.errors import Code, RequestError
from shared.frames import Beat, EngineFacts
from shared.roles import ROLES, find
from shared.roles.role import Asked, Role
from tests.unit.test_agent_handler import Context
from tests.unit.test_service import INCARNATION, Bench, ScriptedBackend

FACTS = EngineFacts(
    "aggregated", "scripted", "0", "/m", "m", 100, 4096, 16, 10, 4, 100, 0, 1, 1, [2], 0.1,
    bootstrap_host="192.0.2.1", bootstrap_port=8998, fake_bootstrap_host="2.2.2.2", traces=True, uploads=True,
)  # fmt: skip
TEXT = {name: find(name, text=True) for name in ROLES}
FUZZED: dict[str, Role] = {**ROLES, **{f"{name}, text": role for name, role in TEXT.items() if role is not ROLES[name]}}
NO_BOOTSTRAP = "bootstrap_info is required"
ANSWERS = ("tokens", "tokens", "tokens", "refused", "oops", "abort", "verdict", "client goes", "reader stops")

# --- requests ------------------------------------------------------------------------------------------------------------

WILD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 99, 100, 128, 129, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 2**64, 2**70, -(2**63) - 1,
    0.5, -0.5, 1e308, float("nan"), float("inf"), "", "a", "7", "\x00", "\ud800", "é" * 50, b"\x01\x00\x00\x00", b"\x01",
    [], [1], [[1]], [None], ["a", 1], [2**64], [{"content": [{"type": "input_audio"}]}],
    {}, {"a": 1}, {"n": 2}, {"type": "image_url"},
]  # fmt: skip
wild = st.sampled_from(WILD)


def mostly(*plausible: Any) -> st.SearchStrategy[Any]:
    """One of these, now and then something wild."""
    return st.sampled_from([*plausible * (30 * len(WILD) // len(plausible) + 1), *WILD])


def fields(**optional: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """An object with some of the fields, or something wild in its place."""
    return st.integers(0, 40).flatmap(lambda dice: wild if dice == 0 else st.fixed_dictionaries({}, optional=optional))


NVEXT = fields(
    cache_salt=mostly("s"),
    max_thinking_tokens=mostly(None, 5),
    metadata_upload=mostly(None, {"url": "file:///x"}, {"storage_path": "x"}),
    extra_fields=mostly(["stop_reason"]),
)
BOOTSTRAP = fields(bootstrap_host=mostly("192.0.2.7"), bootstrap_port=mostly(8998), bootstrap_room=mostly(0, 7, 2**63 - 1))
ROUTING = fields(dp_rank=mostly(0, 2**32 - 1), prefill_dp_rank=mostly(0), priority=mostly(0, 5, -3, 1.5), cache_salt=mostly("s"))
GUIDED = fields(
    json=mostly({"type": "object"}, {"$ref": "#"}),
    regex=mostly("a+", "("),
    choice=mostly(["a", "b"], [None]),
    grammar=mostly("root ::= x"),
    structural_tag=mostly({"type": "tag"}, "tag"),
)
SAMPLING = fields(
    n=mostly(1, 2, 3, None),
    temperature=mostly(0.5, 0, None),
    top_p=mostly(0.9),
    top_k=mostly(5, -1),
    min_p=mostly(0.1),
    presence_penalty=mostly(0.5),
    frequency_penalty=mostly(-0.5),
    repetition_penalty=mostly(1.1),
    seed=mostly(7, 2**64 - 1),
    guided_decoding=GUIDED,
)
STOP = fields(
    max_tokens=mostly(5, None, 0),
    min_tokens=mostly(2, None),
    stop_token_ids=mostly([7], [100, -1], [2**40]),
    stop_token_ids_hidden=mostly([2]),
    ignore_eos=mostly(True, False, None),
    max_thinking_tokens=mostly(5, None),
)
NATIVE = fields(
    sampling_params=mostly({}, {"n": 2}, {"temperature": 0}, None),
    rid=mostly("client", "", None),
    session_params=mostly({"id": "s"}, None),
    cache_salt=mostly("s", None),
    text=mostly("a"),
)
EXTRA = fields(sglang_tito=NATIVE, nvext=NVEXT, messages=mostly([{"role": "user", "content": "hi"}]))
TOKENS: dict[str, st.SearchStrategy[Any]] = {
    "token_ids": mostly([5, 6], [5], [5], b"\x05\x00\x00\x00", (5, 6), [99], [100]),
    "model": mostly("m", "adapter", None),
    "stop_conditions": STOP,
    "sampling_options": SAMPLING,
    "output_options": fields(logprobs=mostly(2, 0), prompt_logprobs=mostly(1), return_tokens_as_token_ids=mostly(True)),
    "routing": ROUTING,
    "bootstrap_info": BOOTSTRAP,
    "annotations": mostly([], ["x"], ["x-bypass-remote-prefill"]),
    "extra_args": EXTRA,
    "nvext": NVEXT,
    "cache_salt": mostly("s", None),
    "agent_context": mostly({"session_id": "s"}),
    "thinking_token_budget": mostly(5, None),
    "require_reasoning": mostly(True, False),
    "multi_modal_data": mostly({}, None, {"image_url": ["x"]}),
    "_HEALTH_CHECK": mostly(True),
}
OPENAI: dict[str, st.SearchStrategy[Any]] = {
    "model": mostly("m"),
    "messages": mostly([{"role": "user", "content": "hi"}], [{"role": "user", "content": [{"type": "image_url"}]}]),
    "prompt": mostly("hi"),
    "text": mostly("hi"),
    "chat_template_kwargs": mostly({"enable_thinking": False}),
    "max_tokens": mostly(5, None),
    "max_completion_tokens": mostly(5, None),
    "min_tokens": mostly(2, None),
    "n": mostly(1, 2, None),
    "seed": mostly(7, 2**64 - 1),
    "temperature": mostly(0.5),
    "stop": mostly("a", ["a"], [7], ["a", 7]),
    "stop_token_ids": mostly([7], [2**40]),
    "guided_decoding": GUIDED,
    "routing": ROUTING,
    "bootstrap_info": BOOTSTRAP,
    "nvext": NVEXT,
    "extra_args": EXTRA,
}
EMBEDDING: dict[str, st.SearchStrategy[Any]] = {
    "model": mostly("m"),
    "input": mostly("a", ["a", "b"], [5, 6], [[5], [6, 7]], [[5], []], [[5], "a"], [100], [[100]], [True], [""]),
    "dimensions": mostly(1, 2, 3, None),
    "encoding_format": mostly("float", "base64", None),
}
RERANK: dict[str, st.SearchStrategy[Any]] = {
    "model": mostly("m"),
    "query": mostly("q", " "),
    "documents": mostly(["a", "b"], ["a"], ["a", " "]),
    "top_n": mostly(1, 5, None),
    "return_documents": mostly(True, False),
}
SIZES = mostly("64x64", "auto", "0x1", "1x99999", "x", "64x64x64", "\u0663x4", None)
IMAGE: dict[str, st.SearchStrategy[Any]] = {
    "model": mostly("m"),
    "prompt": mostly("p", ""),
    "n": mostly(1, 2, 10, 11, 0, None),
    "size": SIZES,
    "response_format": mostly("url", "b64_json", None),
    "user": mostly("u", "../x", ".", "", "\ud800", "x" * 300),
    "input_reference": mostly(None, "https://x.invalid/a.png", " "),
    "nvext": wild | st.dictionaries(st.sampled_from(["num_inference_steps", "guidance_scale", "seed", "negative_prompt"]), wild),
}
VIDEO: dict[str, st.SearchStrategy[Any]] = {
    **{name: IMAGE[name] for name in ("model", "prompt", "response_format", "input_reference")},
    "size": SIZES,
    "seconds": mostly(1, 4, 0, 601, None),
    "output_format": mostly("mp4", "webm", None),
    "nvext": wild
    | st.dictionaries(st.sampled_from(["fps", "num_frames", "num_inference_steps", "guidance_scale", "seed"]), wild),
}
NEEDED = ("token_ids", "model", "input", "query", "documents", "prompt")
"""There in most requests: without them nearly every request would be refused for that alone."""


def request_of(kinds: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    whole = st.fixed_dictionaries({name: kinds[name] for name in NEEDED if name in kinds}, optional=_rest(kinds))
    return st.one_of(whole, whole, whole, whole, whole, st.fixed_dictionaries({}, optional=kinds))


def _rest(kinds: dict[str, st.SearchStrategy[Any]]) -> dict[str, st.SearchStrategy[Any]]:
    return {name: kind for name, kind in kinds.items() if name not in NEEDED}


token_requests = request_of(TOKENS)
anything = st.recursive(
    wild,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(TOKENS)), inner, max_size=3),
    max_leaves=5,
)
wrapped = st.fixed_dictionaries({"request": token_requests}, optional={"sampling_params": SAMPLING})
requests = st.integers(0, 19).flatmap(
    lambda dice: anything if dice == 0 else request_of(OPENAI) if dice == 1 else wrapped if dice == 2 else token_requests
)
BY_ROLE = {
    "embedding": request_of(EMBEDDING),
    "rerank": request_of(RERANK),
    "image": request_of(IMAGE),
    "video": request_of(VIDEO),
}


def cases() -> st.SearchStrategy[tuple[str, Any, str]]:
    def of(name: str) -> st.SearchStrategy[tuple[str, Any, str]]:
        own = request_of(OPENAI) if name.endswith("text") else BY_ROLE.get(name, requests)
        return st.tuples(st.just(name), own if name in BY_ROLE or name.endswith("text") else requests, st.sampled_from(ANSWERS))

    return st.one_of(*(of(name) for name in FUZZED), of("aggregated"), of("decode"), of("prefill"))


# --- the bench -----------------------------------------------------------------------------------------------------------


class AnsweringBackend(ScriptedBackend):
    """Answers each request as the example says, in the shape that the payload asks for."""

    facts = FACTS

    def __init__(self) -> None:
        super().__init__()
        self.answer = "tokens"
        self.service: Service
        self.running: set[str] = set()

    def submit(self, rid: str, payload: dict[str, Any]) -> None:
        self.running.add(rid)
        asyncio.get_running_loop().call_soon(self._answer, rid, payload)

    def abort(self, rid: str) -> None:
        if rid in self.running:
            self._end(rid, {"type": "abort", "message": "Aborted"}, None)

    def _end(self, rid: str, finish: dict[str, Any], meta: dict[str, Any] | None, tokens: tuple[int, ...] = ()) -> None:
        self.running.discard(rid)
        self.service.output(rid, list(tokens), finish, meta)

    def _answer(self, rid: str, payload: dict[str, Any]) -> None:
        if rid not in self.running:
            return
        match self.answer:
            case "refused" | "oops":
                self.running.discard(rid)
                self.service.failed(rid, Code.INVALID if self.answer == "refused" else Code.INTERNAL, self.answer)
            case "abort":
                self._end(rid, {"type": "abort"}, None)
            case "verdict":
                self._end(rid, {"type": "abort", "status_code": 503, "message": "verdict"}, None)
            case "client goes" | "reader stops":
                self.service.output(rid, [7], None, _meta(payload))
            case _:
                self.service.output(rid, [7], None, _meta(payload), "hi")
                asyncio.get_running_loop().call_soon(self._end, rid, {"type": "stop", "matched": 7}, _meta(payload), (8,))


def _meta(payload: dict[str, Any]) -> dict[str, Any]:
    """What procs.engine.adapter.calls.meta_of would say of such a request."""
    usage: dict[str, Any] = {"prompt_tokens": 2, "completion_tokens": 1, "cached_tokens": 1}
    match payload.get("call", "generate"):
        case "native":
            return {"native": {"meta_info": {**usage, "finish_reason": None}, "text": "hi"}}
        case "embed" if payload.get("is_cross_encoder_request"):
            return {"prompt_tokens": 2, "scores": [0.5 for _ in payload["text"]], "infos": []}
        case "embed":
            return {"prompt_tokens": 2, "vectors": [b"\x00" * 8]}
        case "diffuse":  # what the agent has made of the file
            return {"place": {"b64_json": "AA=="}}
    if payload.get("return_logprob"):
        usage |= {"output_token_logprobs": [[-0.5, 7, None]], "output_top_logprobs": [[[-0.5, 7, None]]]}
    return usage


class FuzzContext(Context):
    def trace_headers(self) -> dict[str, str]:
        return {"traceparent": "00-1-2-01"}

    def detached(self, name: str) -> "FuzzContext":
        return FuzzContext()

    def stop_generating(self) -> None:
        """The other worker of a fuzz ends by itself."""


class OtherWorker:
    """Stands for Dynamo's client of what a role has asked: a prefill that is asked ``first``, or a worker that answers."""

    def __init__(self, *, first: bool) -> None:
        where = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 1}
        self._chunk = json.dumps(where if first else {"token_ids": [1], "finish_reason": "stop", "finished": True})

    async def round_robin(self, body: Any, context: Any) -> AsyncIterator[str]:
        json.loads(body)

        async def chunks() -> AsyncIterator[str]:
            yield self._chunk

        return chunks()


class Fuzz:
    """One bench for all examples."""

    def __init__(self, directory: Path) -> None:
        self.bench = Bench(directory)
        self.backend = AnsweringBackend()
        self.bench.service._backend = self.backend
        self.backend.service = self.bench.service
        self.client = EngineClient(directory, "agent:0")
        self.beat()
        self.handlers = {name: Handler(self.client, role, lambda: "") for name, role in FUZZED.items()}
        for handler in self.handlers.values():
            handler.callees = Callees(
                "the other worker", OtherWorker(first=bool(handler.role.callee and handler.role.callee.first))
            )
        self.outcomes: dict[str, int] = {}

    def beat(self) -> None:
        """The engine's, which no heart repeats here."""
        self.client.hear_beat(Beat("engine", 1, "ready", "", 0.0, "", INCARNATION, 0))

    async def one(self, name: str, request: Any, answer: str) -> None:
        self.beat()
        await self.bench.until(lambda: self.client.welcome is not None)  # an import in the example before may have taken seconds
        self.backend.answer = answer
        outcome = await asyncio.wait_for(self._call(self.handlers[name], request, answer), 5)
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self._check(name, answer, outcome)
        if not self.clean():
            await self.bench.until(self.clean)

    async def _call(self, handler: Handler, request: Any, answer: str) -> str:
        context = FuzzContext()
        chunks = handler.endpoint(request, context)
        try:
            async for chunk in chunks:
                assert msgspec.msgpack.encode(chunk)
                if answer == "client goes" and not context.killed.done():
                    context.killed.set_result(True)
                elif answer == "reader stops":
                    await chunks.aclose()  # type: ignore[attr-defined]
                    return "stopped"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "answered"

    def _check(self, name: str, answer: str, outcome: str) -> None:
        kind, _, message = outcome.partition(": ")
        if kind in ("answered", "stopped", InvalidArgument.__name__):
            return
        expected = {
            "oops": (RuntimeError.__name__, "oops"),
            "abort": (EngineShutdown.__name__, ""),
            "verdict": (HttpError.__name__, ""),
        }.get(answer)
        if kind == RuntimeError.__name__ and message.startswith(NO_BOOTSTRAP):
            assert FUZZED[name].worker_type == "Decode", outcome
        elif FUZZED[name].worker_type in ("Prefill", "Decode") and answer == "verdict":
            assert kind in (CannotConnect.__name__, Disconnected.__name__), outcome
        else:
            assert expected is not None and kind == expected[0] and expected[1] in message, (name, answer, outcome)

    def clean(self) -> bool:
        """Nothing is left of any request in any table."""
        service, peers = self.bench.service, self.bench.service._peers.values()
        return not (
            any(handler._streams or handler.running or handler.peers._of for handler in self.handlers.values())
            or self.client._streams
            or self.client._controls
            or service._streams
            or any(peer.rids or peer.waiting for peer in peers)
            or self.backend.running
        )

    async def close(self) -> None:
        for handler in self.handlers.values():
            handler.peers.close()
        self.client.close()
        self.bench.service.close()
        self.bench.heart.close()
        self.bench.context.term()


@pytest.fixture
def fuzz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Any, str], Fuzz]]:
    """Runs one example on the bench that all share."""

    async def nowhere(*_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()

    # No request of a test may reach out for the prefill engine that it names.
    monkeypatch.setattr(asyncio, "open_connection", nowhere)
    logging.disable(logging.CRITICAL)
    with asyncio.Runner() as runner:

        async def made() -> Fuzz:
            found = Fuzz(tmp_path)
            await found.bench.until(lambda: found.client.welcome is not None)
            return found

        bench = runner.run(made())

        def run(name: str, request: Any, answer: str) -> Fuzz:
            runner.run(bench.one(name, request, answer))
            return bench

        yield run
        runner.run(bench.close())
    logging.disable(logging.NOTSET)


def translated(role: Role, request: Any) -> list[dict[str, Any]] | RequestError:
    """The agent's translation alone; any other exception is the test's failure."""
    try:
        payloads = role.to_engine(Asked(request, FACTS, "ctx", {"traceparent": "00-1-2-01"}))
    except RequestError as error:
        return error
    # A worker that has others answer may have nothing for its own engine to do.
    assert (payloads or role.callee is not None) and all(isinstance(payload, dict) for payload in payloads)
    return payloads


@settings(
    max_examples=10_000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(case=cases())
def _every_request(fuzz: Callable[[str, Any, str], Fuzz], seen: list[Fuzz], case: tuple[str, Any, str]) -> None:
    name, request, answer = case
    role = FUZZED[name]
    before = copy.deepcopy(request)
    if isinstance(request, dict):
        found = translated(role, request)
        if isinstance(found, RequestError):
            missing = role.worker_type == "Decode" and found.message.startswith(NO_BOOTSTRAP)
            assert found.code == (Code.INTERNAL if missing else Code.INVALID), found.message
        else:
            check_payloads(found)
        assert repr(request) == repr(before), "Dynamo's request is its own"
    seen[:] = [fuzz(name, request, answer)]


def check_payloads(payloads: list[dict[str, Any]]) -> None:
    """What would cost others: a scheduler dies of these."""
    for payload in payloads:
        params = payload.get("sampling_params") or {}
        if payload.get("call", "generate") in ("generate", "text"):
            assert all(0 <= token < FACTS.vocab_size for token in params.get("stop_token_ids") or ())
            assert all(isinstance(params.get(name), str | None) for name in ("regex", "ebnf", "json_schema", "structural_tag"))
        ids = payload.get("input_ids") or []
        flat = [token for item in ids for token in (item if isinstance(item, list) else [item])]
        assert all(type(token) is int and 0 <= token < FACTS.vocab_size for token in flat)


def test_ten_thousand_wild_requests_fail_by_type_or_are_served_and_leave_nothing(
    fuzz: Callable[[str, Any, str], Fuzz],
) -> None:
    seen: list[Fuzz] = []
    _every_request(fuzz, seen)
    (bench,) = seen
    outcomes: dict[str, int] = {}
    for outcome, count in bench.outcomes.items():
        outcomes[outcome.partition(":")[0]] = outcomes.get(outcome.partition(":")[0], 0) + count
    assert outcomes["answered"] > 1_000 and outcomes["InvalidArgument"] > 1_000, outcomes
    assert {"stopped", "RuntimeError", "EngineShutdown", "HttpError", "CannotConnect"} <= outcomes.keys(), outcomes


def test_what_no_frame_can_carry_is_the_request_s_own_fault() -> None:
    for value in (2**64, "\ud800", object()):
        with pytest.raises(sockets.UNENCODABLE):
            sockets.encode(Beat("p", 1, "s", "", 0.0, "", 0, 0, info={"a": value}))  # type: ignore[dict-item]
