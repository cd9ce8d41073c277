"""One request through an agent: Dynamo's dict in, chunks out, cancellation and failures on the way."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from procs.agent.egress import Egress, Sender
from procs.agent.failures import abort_exception, exception
from procs.agent.latency import Latency
from procs.agent.media import Intake
from procs.agent.peers import Peers
from procs.agent.tracing import RequestSpan, Tracing, prompt_tokens
from shared.engine_client import EngineClient, Stream, interleaved
from shared.errors import Code, RequestError
from shared.frames import Output
from shared.roles import media
from shared.roles.role import Asked, Chunk, Media, Payload, Role


class Handler:
    """Serves the ``generate`` endpoint. ``refuse`` says why no request is taken now, or is empty."""

    def __init__(self, client: EngineClient, role: Role, refuse: Callable[[], str]) -> None:
        self._client = client
        self.role = role
        self._refuse = refuse
        self._streams: set[Stream] = set()
        self.handover = role.worker_type in ("Prefill", "Decode")
        self._egress: Egress | None = None
        self.peers = Peers()
        self.tracing: Tracing | None = None
        self.intake: Intake | None = None
        """Fetches requests' media; None for a role that takes none."""
        self.latency = Latency()
        self.running = 0
        self.total = 0
        self.first_token_source: Any | None = None
        self.on_chunk: Callable[[Chunk], None] | None = None
        """Sees each chunk as it leaves, where something is measured by it."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when a request has ended."""

    def generate(self, request: dict[str, Any], context: Any, response_sender: Sender | None = None) -> AsyncIterator[Chunk]:
        """Dynamo 1.6.1 calls this for each request and finds the last two parameters by their names.

        With a ``response_sender`` the chunks are pushed to it and the generator yields none; Dynamo's own health check has none.
        """
        return self._pulled(request, context) if response_sender is None else self._pushed(request, context, response_sender)

    async def _pulled(self, request: dict[str, Any], context: Any) -> AsyncIterator[Chunk]:
        async with self._answering(request, context) as answer:
            if answer.opening is not None:
                yield answer.opening
            async for index, output in interleaved(answer.streams):
                chunk = answer.chunk(index, output, self.latency.clock())
                if chunk is not None:
                    yield chunk

    async def _pushed(self, request: dict[str, Any], context: Any, sender: Sender) -> AsyncIterator[Chunk]:
        async with self._answering(request, context) as answer:
            if self._egress is None:
                self._egress = Egress(self.latency.clock)
                gc.freeze()  # what start-up made stays: a collection that looks at it holds every stream for 6 ms
            if answer.streams:
                await self._egress.response(sender, answer.streams, answer.chunk).run(answer.opening)
        return
        yield  # Dynamo wants a generator

    @asynccontextmanager
    async def _answering(self, request: dict[str, Any], context: Any) -> AsyncIterator["_Answer"]:
        """A request from its arrival to its end, submitted. What it raises is Dynamo's."""
        self.running += 1
        self.total += 1
        answer = _Answer(self, context)
        span: RequestSpan | None = None
        try:
            headers = context.trace_headers()
            if self.tracing is not None:
                answer.span = span = self.tracing.begin(context.id(), headers, prompt_tokens(request))
                headers = span.headers
            if self.intake is not None and isinstance(request, dict) and request.get(media.DATA):
                answer.media = await self._gather(self.intake, request, context)
                if answer.media is None:
                    yield answer  # the client has gone: there is nothing to answer
                    return
            answer.asked, answer.opening = self._submit(request, context, headers, answer)
            if span is not None:
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
            for stream in answer.streams:
                stream.abort()
                self.peers.release(stream)
            self._streams.difference_update(answer.streams)
            self.running -= 1
            self.on_change()

    async def _gather(self, intake: Intake, request: dict[str, Any], context: Any) -> Media | None:
        """The request's media; None when the client has gone meanwhile. Raises RequestError."""
        if reason := self._refuse():
            raise RequestError(Code.DRAINING, reason)
        gathering = asyncio.ensure_future(intake.gather(request[media.DATA]))
        gone = asyncio.ensure_future(context.async_killed_or_stopped())
        try:
            await asyncio.wait((gathering, gone), return_when=asyncio.FIRST_COMPLETED)
            return gathering.result() if gathering.done() else None
        finally:
            gone.cancel()
            if not gathering.done():
                gathering.cancel()

    def _release(self, answer: "_Answer") -> None:
        """The engine has read this request's media, or nobody will."""
        if answer.media is not None and self.intake is not None:
            self.intake.release(answer.media)

    def _submit(
        self, request: dict[str, Any], context: Any, headers: dict[str, str] | None, answer: "_Answer"
    ) -> tuple[Asked, Chunk | None]:
        """Submit every sample; ``answer`` has those that were, also when one is refused. ``headers``: of the trace."""
        streams = answer.streams
        context_id = context.id()
        headers = headers or {}
        client = headers.get("x-request-id", "")
        ids = {"request_id": context_id, "x_request_id": client, "trace_id": headers.get("traceparent", "")[3:35]}
        logging.debug("New Request ID: %s", context_id, extra=ids)
        if reason := self._refuse():
            raise RequestError(Code.DRAINING, reason)
        if self._client.welcome is None:
            raise RequestError(Code.ENGINE_DEAD, "no engine is up")
        facts = self._client.welcome.facts
        if not isinstance(request, dict):
            raise RequestError(Code.INVALID, "invalid request: expected an object")
        asked = Asked(request, facts, context_id, headers or None if facts.traces else None, media=answer.media)
        try:
            payloads = self.role.to_engine(asked)
            opening = self.role.opening(asked, payloads[0])
        except RequestError:
            raise
        except Exception as error:  # a defect of ours must not look like anything else
            logging.exception("request %s was not understood", context_id, extra=ids)
            raise RequestError(Code.INTERNAL, f"{type(error).__name__}: {error}") from None
        if self.first_token_source is not None:
            self.first_token_source.bind(context, (request.get("routing") or {}).get("dp_rank"))
        for payload in payloads:
            stream = self._client.submit(payload, context_id)
            streams.append(stream)
            self._streams.add(stream)
            self._needs_peer(payload, stream)
            logging.info("Submitted SGLang Request ID: %s, Context: %s", stream.rid, context_id, extra={**ids, "rid": stream.rid})
        return asked, opening

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
        for stream in list(self._streams):
            if not stream.ended:
                stream.abort()
                stream.fail(RequestError(Code.ENGINE_DEAD, "the node is stopping"))


class _Answer:
    """One request's outputs on their way to chunks."""

    asked: Asked
    opening: Chunk | None = None

    def __init__(self, handler: Handler, context: Any) -> None:
        self._handler = handler
        self._context = context
        self._to_dynamo = handler.role.to_dynamo
        self._on_chunk = handler.on_chunk
        self._timing = handler.latency.request()
        self._killed: asyncio.Future[Any] | None = None
        self._nobody_listens = False
        self.streams: list[Stream] = []
        self.media: Media | None = None
        self.span: RequestSpan | None = None
        self.started = False

    def listen_for_its_end(self) -> None:
        """From now on a client that goes aborts it."""
        self._killed = asyncio.ensure_future(self._context.async_killed_or_stopped())
        self._killed.add_done_callback(self._client_gone)

    def close(self) -> None:
        if self._killed is not None:
            self._killed.cancel()

    def _client_gone(self, killed: asyncio.Future[Any]) -> None:
        if killed.cancelled():
            return
        self._nobody_listens = True  # only the terminal outputs are waited for
        context_id = self._context.id()
        logging.info("Aborted Request ID: %s", context_id, extra={"request_id": context_id})
        for stream in self.streams:
            stream.abort()

    def chunk(self, index: int, output: Output, now: float) -> Chunk | None:
        """What the client gets of it. Raises what ends the request."""
        handler = self._handler
        if not output.offset:
            handler.peers.release(self.streams[index])
        if self.span is not None:
            self.span.output(output)
        if self._nobody_listens:
            return None
        finish = output.finish
        if finish is not None and finish.get("type") == "abort" and not _is_verdict(finish, self.asked):
            raise abort_exception(finish, started=self.started, handover=handler.handover)
        chunk = self._to_dynamo(output, index, self.asked)
        self._timing.chunk(index, len(output.token_ids), now)
        if not self.started:
            self.started = True
            if self.media is not None:
                handler._release(self)
            self._context.notify_first_token()
        if chunk is not None and self._on_chunk is not None:
            self._on_chunk(chunk)
        return chunk


def _is_verdict(finish: dict[str, Any], asked: Asked) -> bool:
    """SGLang's own word on an engine-native request, which has its own form in the answer."""
    return "native" in asked.kept and finish.get("status_code") is not None
