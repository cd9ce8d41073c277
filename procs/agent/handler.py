"""One request through an agent: Dynamo's dict in, chunks out, cancellation and failures on the way."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import msgspec

from procs.agent.callee import Call, Callees
from procs.agent.egress import Egress, Sender
from procs.agent.failures import abort_exception, exception
from procs.agent.latency import Latency
from procs.agent.media import Intake
from procs.agent.peers import Peers
from procs.agent.tracing import RequestSpan, Tracing, prompt_tokens
from shared.engine_client import EngineClient, Stream, interleaved
from shared.errors import Code, RequestError
from shared.frames import EngineFacts, Output
from shared.roles import media
from shared.roles.role import Asked, Chunk, Media, Payload, Request, Role

T = TypeVar("T")
STOPPING = RequestError(Code.ENGINE_DEAD, "the node is stopping")


class Handler:
    """Serves the ``generate`` endpoint. ``refuse`` says why no request is taken now, or is empty."""

    def __init__(self, client: EngineClient, role: Role, refuse: Callable[[], str]) -> None:
        self._client = client
        self.role = role
        self._refuse = refuse
        self._streams: set[Stream] = set()
        self._calls: set[Call] = set()
        self._gathering: set[asyncio.Future[Media]] = set()
        """Media that are being fetched, of requests that the engine has not seen."""
        self.handover = role.worker_type in ("Prefill", "Decode")
        self._egress: Egress | None = None
        self.peers = Peers()
        self.tracing: Tracing | None = None
        self.intake: Intake | None = None
        """Fetches requests' media; None for a role that takes none."""
        self.callees: Callees | None = None
        """The other workers that this role's requests need (Role.callee); None until there is a runtime."""
        self.latency = Latency()
        self.running = 0
        self.total = 0
        self.first_token_source: Any | None = None
        self.on_chunk: Callable[[Chunk], None] | None = None
        """Sees each chunk as it leaves, where something is measured by it."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when a request has ended."""

    @property
    def endpoint(self) -> Callable[..., AsyncIterator[Chunk]]:
        """What Dynamo is to call for each request. Another worker's chunks are not merged: they are pulled, one by one."""
        callee = self.role.callee
        return self.generate if callee is None or callee.first else self.relay

    async def relay(self, request: Request | str, context: Any) -> AsyncIterator[Chunk]:
        """A request whose callee answers the client, once the engine has done its part."""
        callee = self.role.callee
        assert callee is not None
        async with self._answering(request, context) as answer:
            for index, stream in enumerate(answer.streams):
                chunk = answer.translated(index, await _first(stream))
                self._release(answer)
                if chunk is not None:
                    yield chunk
            body = None if answer.nobody_listens else self._by_role(answer, callee.request, answer.asked)
            if body is None:
                return
            call = self._call(answer, body)
            for stream in answer.streams:
                stream.on_ready = partial(answer.engine_said, stream, call)
                stream.on_ready()
            async for raw in call:
                chunk = self._by_role(answer, callee.take, raw, answer.asked)
                if chunk is not None:
                    yield answer.passed(chunk)
            if not answer.finished and not answer.nobody_listens:
                raise RequestError(Code.PEER_DEAD, "the generating worker's answer ended before its last chunk")

    def generate(self, request: Request | str, context: Any, response_sender: Sender | None = None) -> AsyncIterator[Chunk]:
        """Dynamo 1.6.1 calls this for each request and finds the last two parameters by their names.

        With a ``response_sender`` the chunks are pushed to it and the generator yields none; Dynamo's own health check has none.
        """
        return self._pulled(request, context) if response_sender is None else self._pushed(request, context, response_sender)

    async def _pulled(self, request: Request | str, context: Any) -> AsyncIterator[Chunk]:
        async with self._answering(request, context) as answer:
            if answer.opening is not None:
                yield answer.opening
            async for index, output in interleaved(answer.streams):
                chunk = answer.chunk(index, output, self.latency.clock())
                if chunk is not None:
                    yield chunk

    async def _pushed(self, request: Request | str, context: Any, sender: Sender) -> AsyncIterator[Chunk]:
        async with self._answering(request, context) as answer:
            if self._egress is None:
                self._egress = Egress(self.latency.clock)
                gc.freeze()  # what start-up made stays: a collection that looks at it holds every stream for 6 ms
            if answer.streams:
                await self._egress.response(sender, answer.streams, answer.chunk).run(answer.opening)
        return
        yield  # Dynamo wants a generator

    @asynccontextmanager
    async def _answering(self, request: Request | str, context: Any) -> AsyncIterator["_Answer"]:
        """A request from its arrival to its end, submitted. What it raises is Dynamo's."""
        self.running += 1
        self.total += 1
        answer = _Answer(self, context)
        span: RequestSpan | None = None
        try:
            headers = context.trace_headers()
            found = _opened(request)
            if self.tracing is not None:
                answer.span = span = self.tracing.begin(context.id(), headers, prompt_tokens(found))
                headers = span.headers
            if reason := self._refuse():  # once: what was taken before a drain is served
                raise RequestError(Code.DRAINING, reason)
            if self.intake is not None and found.get(media.DATA):
                answer.media = await self._gather(self.intake, found, context)
                answer.nobody_listens = answer.media is None
            if not answer.nobody_listens:
                answer.asked = self._asked(found, context, headers, answer)
                await self._ask(answer)
            if answer.nobody_listens:
                yield answer  # there is nothing to answer
                return
            answer.opening = self._submit(answer)
            if span is not None and answer.streams:
                span.submitted(answer.streams[0].rid)
            answer.listen_for_its_end()
            yield answer
        except RequestError as error:
            if span is not None:
                span.failed(error)
            raise exception(error, started=answer.started) from None  # Dynamo logs the whole chain
        except BaseException as error:
            if span is not None:
                span.failed(error)
            raise
        finally:
            if span is not None:
                span.end()
            answer.close()
            self._release(answer)
            for call in answer.calls:
                call.abort()
            self._calls.difference_update(answer.calls)
            for stream in answer.streams:
                stream.abort()
                self.peers.release(stream)
            self._streams.difference_update(answer.streams)
            self.running -= 1
            self.on_change()

    async def _gather(self, intake: Intake, request: dict[str, Any], context: Any) -> Media | None:
        """The request's media; None when the client has gone meanwhile. Raises RequestError."""
        media.taken(request, self._facts())
        gathering = asyncio.ensure_future(intake.gather(request[media.DATA]))
        gone = asyncio.ensure_future(context.async_killed_or_stopped())
        self._gathering.add(gathering)
        claimed = False
        try:
            await asyncio.wait((gathering, gone), return_when=asyncio.FIRST_COMPLETED)
            if not gathering.done():
                return None
            if gathering.cancelled():
                raise STOPPING
            claimed = True
            return gathering.result()
        finally:
            gone.cancel()
            self._gathering.discard(gathering)
            if not claimed:
                gathering.add_done_callback(partial(_unclaimed, intake))
                gathering.cancel()

    def _release(self, answer: "_Answer") -> None:
        """The engine has read this request's media, or nobody will."""
        if answer.media is not None and self.intake is not None:
            self.intake.release(answer.media)

    def _asked(self, request: Request, context: Any, headers: dict[str, str] | None, answer: "_Answer") -> Asked:
        """``headers``: of the trace. Raises RequestError when no engine is up."""
        context_id = context.id()
        headers = headers or {}
        client = headers.get("x-request-id", "")
        answer.ids = {"request_id": context_id, "x_request_id": client, "trace_id": headers.get("traceparent", "")[3:35]}
        logging.debug("New Request ID: %s", context_id, extra=answer.ids)
        facts = self._facts()
        return Asked(request, facts, context_id, headers or None if facts.traces else None, media=answer.media)

    def _facts(self) -> EngineFacts:
        """Of the engine that is up. Raises RequestError when none is."""
        if self._client.welcome is None:
            raise RequestError(Code.ENGINE_DEAD, "no engine is up")
        return self._client.welcome.facts

    async def _ask(self, answer: "_Answer") -> None:
        """Ask the other worker that this role asks first. The client may go meanwhile."""
        callee = self.role.callee
        body = self._by_role(answer, callee.request, answer.asked) if callee is not None and callee.first else None
        if callee is None or body is None:
            return
        answer.listen_for_its_end()
        call = self._call(answer, body)
        chunk = await anext(call, None)
        if answer.nobody_listens:
            return
        if chunk is None:
            raise RequestError(Code.PEER_DEAD, "the worker that was asked first ended without an answer")
        self._by_role(answer, callee.take, chunk, answer.asked)
        call.ignore()
        call.on_fail = answer.callee_failed
        if call.failure is not None:
            raise call.failure

    def _call(self, answer: "_Answer", body: Request | str) -> Call:
        if self.callees is None:
            raise RequestError(Code.INTERNAL, "there is no runtime to call other workers with")
        call = self.callees.call(body, answer.context)
        answer.calls.append(call)
        self._calls.add(call)
        return call

    def _by_role(self, answer: "_Answer", translate: Callable[..., T], *given: Any) -> T:
        """What the role makes of it. A defect of ours must not look like anything else."""
        try:
            return translate(*given)
        except RequestError:
            raise
        except Exception as error:
            logging.exception("request %s was not understood", answer.asked.context_id, extra=answer.ids)
            raise RequestError(Code.INTERNAL, f"{type(error).__name__}: {error}") from None

    def _submit(self, answer: "_Answer") -> Chunk | None:
        """Submit every sample, and return the opening; ``answer`` has those that were, also when one is refused."""
        asked = answer.asked
        payloads = self._by_role(answer, self.role.to_engine, asked)
        opening = self._by_role(answer, self.role.opening, asked, payloads[0]) if payloads else None
        if self.first_token_source is not None:
            self.first_token_source.bind(answer.context, (asked.request.get("routing") or {}).get("dp_rank"))
        for payload in payloads:
            stream = self._client.submit(payload, asked.context_id)
            answer.streams.append(stream)
            self._streams.add(stream)
            self._needs_peer(payload, stream)
            said = {**answer.ids, "rid": stream.rid}
            logging.info("Submitted SGLang Request ID: %s, Context: %s", stream.rid, asked.context_id, extra=said)
        return opening

    def _needs_peer(self, payload: Payload, stream: Stream) -> None:
        """A decode request waits for the prefill engine that it names; a canary names none."""
        where = payload.get("fields", payload)
        host, port = where.get("bootstrap_host"), where.get("bootstrap_port")
        welcome = self._client.welcome
        if self.role.worker_type == "Decode" and host and port and welcome and host != welcome.facts.fake_bootstrap_host:
            self.peers.hold(host, port, stream)

    def close(self) -> None:
        """The thread that sends ends, after what it has."""
        if self._egress is not None:
            self._egress.close()

    def cut(self) -> None:
        """The drain deadline: what still runs ends with the migratable error."""
        for gathering in self._gathering:
            gathering.cancel()
        for call in list(self._calls):
            call.fail(STOPPING)
        for stream in list(self._streams):
            if not stream.ended:
                stream.abort()
                stream.fail(STOPPING)


def _unclaimed(intake: Intake, gathering: asyncio.Future[Media]) -> None:
    """Media that came when their request was gone."""
    if not gathering.cancelled() and gathering.exception() is None:
        intake.release(gathering.result())


async def _first(stream: Stream) -> Output:
    """Its first output. Raises RequestError."""
    said = asyncio.Event()
    stream.on_ready = said.set
    while (output := stream.take()) is None:
        said.clear()
        await said.wait()
    return output


def _opened(request: Any) -> Request:
    """Workers send each other text. Raises RequestError(INVALID)."""
    try:
        found = msgspec.json.decode(request) if isinstance(request, str) else request
    except (msgspec.DecodeError, ValueError):  # ValueError: half a surrogate
        found = None
    if not isinstance(found, dict):
        raise RequestError(Code.INVALID, "invalid request: expected an object")
    return found


class _Answer:
    """One request's outputs on their way to chunks."""

    asked: Asked
    opening: Chunk | None = None

    def __init__(self, handler: Handler, context: Any) -> None:
        self._handler = handler
        self.context = context
        self.ids: dict[str, str] = {}
        """What log lines of it say."""
        self._to_dynamo = handler.role.to_dynamo
        self._on_chunk = handler.on_chunk
        self._timing = handler.latency.request()
        self._killed: asyncio.Future[Any] | None = None
        self.nobody_listens = False
        self.streams: list[Stream] = []
        self.calls: list[Call] = []
        self.finished = False
        self.media: Media | None = None
        self.span: RequestSpan | None = None
        self.started = False

    def listen_for_its_end(self) -> None:
        """From now on a client that goes aborts it."""
        if self._killed is not None:
            return
        self._killed = asyncio.ensure_future(self.context.async_killed_or_stopped())
        self._killed.add_done_callback(self._client_gone)

    def close(self) -> None:
        if self._killed is not None:
            self._killed.cancel()

    def _client_gone(self, killed: asyncio.Future[Any]) -> None:
        if killed.cancelled():
            return
        self.nobody_listens = True  # only the terminal outputs are waited for
        context_id = self.context.id()
        logging.info("Aborted Request ID: %s", context_id, extra={"request_id": context_id})
        for stream in self.streams:
            stream.abort()
        for call in self.calls:
            call.abort()

    def callee_failed(self, error: RequestError) -> None:
        """The worker that was asked first; its part is done once the engine has said something."""
        for stream in self.streams if not self.started else ():
            stream.abort()
            stream.fail(error)

    def engine_said(self, stream: Stream, call: Call) -> None:
        """While the callee answers: an engine that fails before the callee has what it needs of it ends the request."""
        try:
            while (output := stream.take()) is not None:
                if output.finish is not None and output.finish.get("type") == "abort":
                    raise RequestError(Code.ENGINE_DEAD, str(output.finish.get("message") or "the engine gave up"))
        except RequestError as error:
            if not self.started:
                call.fail(error)

    def passed(self, chunk: Chunk) -> Chunk:
        """A callee's chunk, on its way to the client."""
        count = len(chunk.get("token_ids") or ())
        self._timing.chunk(chunk.get("index") or 0, count, self._handler.latency.clock())
        self.finished = self.finished or chunk.get("finish_reason") is not None
        self._begin()
        return chunk

    def translated(self, index: int, output: Output) -> Chunk | None:
        """What the role makes of it. Raises what ends the request."""
        handler = self._handler
        if not output.offset:
            handler.peers.release(self.streams[index])
        if self.span is not None:
            self.span.output(output)
        if self.nobody_listens:
            return None
        finish = output.finish
        if finish is not None and finish.get("type") == "abort" and not _is_verdict(finish, self.asked):
            raise abort_exception(finish, started=self.started, handover=handler.handover)
        return self._to_dynamo(output, index, self.asked)

    def chunk(self, index: int, output: Output, now: float) -> Chunk | None:
        """What the client gets of it. Raises what ends the request."""
        chunk = self.translated(index, output)
        if self.nobody_listens:
            return None
        self._timing.chunk(index, len(output.token_ids), now)
        self._begin()
        if chunk is not None and self._on_chunk is not None:
            self._on_chunk(chunk)
        return chunk

    def _begin(self) -> None:
        if not self.started:
            self.started = True
            self._handler._release(self)
            self.context.notify_first_token()


def _is_verdict(finish: dict[str, Any], asked: Asked) -> bool:
    """SGLang's own word on an engine-native request, which has its own form in the answer."""
    return "native" in asked.kept and finish.get("status_code") is not None
