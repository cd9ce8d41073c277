"""One request through an agent: Dynamo's dict in, chunks out, cancellation and failures on the way."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from procs.agent.failures import abort_exception, exception
from procs.agent.latency import Latency
from procs.agent.peers import Peers
from procs.agent.tracing import RequestSpan, Tracing, prompt_tokens
from shared.engine_client import EngineClient, Stream, interleaved
from shared.errors import Code, RequestError
from shared.frames import Output
from shared.roles.role import Asked, Chunk, Payload, Role


class Handler:
    """Serves the ``generate`` endpoint. ``refuse`` says why no request is taken now, or is empty."""

    def __init__(self, client: EngineClient, role: Role, refuse: Callable[[], str]) -> None:
        self._client = client
        self._role = role
        self._refuse = refuse
        self._streams: set[Stream] = set()
        self._handover = role.worker_type in ("Prefill", "Decode")
        self.peers = Peers()
        self.tracing: Tracing | None = None
        self.latency = Latency()
        self.running = 0
        self.total = 0
        self.first_token_source: Any | None = None
        self.on_chunk: Callable[[Chunk], None] | None = None
        """Sees each chunk as it leaves, where something is measured by it."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when a request has ended."""

    async def generate(self, request: dict[str, Any], context: Any) -> AsyncIterator[Chunk]:
        """Dynamo 1.6.1 calls this for each request; the second parameter must be called ``context``."""
        self.running += 1
        self.total += 1
        timing = self.latency.request()
        streams: list[Stream] = []
        started = False
        killed: asyncio.Future[Any] | None = None
        span: RequestSpan | None = None
        try:
            headers = context.trace_headers()
            if self.tracing is not None:
                span = self.tracing.begin(context.id(), headers, prompt_tokens(request))
                headers = span.headers
            asked, opening = self._submit(request, context, headers, streams)
            if span is not None:
                span.submitted(streams[0].rid)
            killed = asyncio.ensure_future(context.async_killed_or_stopped())
            killed.add_done_callback(lambda done: None if done.cancelled() else _abort(streams, context))
            if opening is not None:
                yield opening
            async for index, output in interleaved(streams):
                self.peers.release(streams[index])
                if span is not None:
                    span.output(output)
                if killed.done():
                    continue  # nobody listens; only the terminal outputs are waited for
                if output.finish is not None and output.finish.get("type") == "abort" and not _is_verdict(output, asked):
                    raise abort_exception(output.finish, started=started, handover=self._handover)
                chunk = self._role.to_dynamo(output, index, asked)
                timing.chunk(index, len(output.token_ids))
                if not started:
                    started = True
                    context.notify_first_token()
                if chunk is not None:
                    if self.on_chunk is not None:
                        self.on_chunk(chunk)
                    yield chunk
        except RequestError as error:
            if span is not None:
                span.failed(error)
            raise exception(error, started=started) from None  # Dynamo logs the whole chain
        except BaseException as error:
            if span is not None:
                span.failed(error)
            raise
        finally:
            if span is not None:
                span.end()
            if killed is not None:
                killed.cancel()
            for stream in streams:
                stream.abort()
                self.peers.release(stream)
            self._streams.difference_update(streams)
            self.running -= 1
            self.on_change()

    def _submit(
        self, request: dict[str, Any], context: Any, headers: dict[str, str] | None, streams: list[Stream]
    ) -> tuple[Asked, Chunk | None]:
        """Submit every sample; ``streams`` has those that were, also when one is refused. ``headers``: of the trace."""
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
        asked = Asked(request, facts, context_id, headers or None if facts.traces else None)
        try:
            payloads = self._role.to_engine(asked)
            opening = self._role.opening(asked, payloads[0])
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
        if self._role.worker_type == "Decode" and host and port and welcome and host != welcome.facts.fake_bootstrap_host:
            self.peers.hold(host, port, stream)

    def cut(self) -> None:
        """The drain deadline: what still runs ends with the migratable error."""
        for stream in list(self._streams):
            if not stream.ended:
                stream.abort()
                stream.fail(RequestError(Code.ENGINE_DEAD, "the node is stopping"))


def _is_verdict(output: Output, asked: Asked) -> bool:
    """SGLang's own word on an engine-native request, which has its own form in the answer."""
    return "native" in asked.kept and (output.finish or {}).get("status_code") is not None


def _abort(streams: list[Stream], context: Any) -> None:
    """The client has gone."""
    logging.info("Aborted Request ID: %s", context.id(), extra={"request_id": context.id()})
    for stream in streams:
        stream.abort()
