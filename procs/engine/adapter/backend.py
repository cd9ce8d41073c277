"""``sgl.Engine`` behind the backend seam: its life, its requests and their aborts."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from procs.engine.adapter import facts, media, shm
from procs.engine.adapter.asks import Asks
from procs.engine.adapter.calls import Answer, Calls
from procs.engine.adapter.embeddings import Embeddings, inbox
from procs.engine.adapter.kv_metrics import KvMetrics
from procs.engine.adapter.reader import BY_THE_STEP, Reader
from procs.engine.adapter.requests import Requests, one_end
from procs.engine.adapter.routes import Routes
from procs.engine.adapter.scheduler import Schedulers
from procs.engine.adapter.scheduler import install as watch_schedulers
from procs.engine.backend import Sink
from shared import kv_sources, log_levels, logs
from shared.config import NodeConfig
from shared.errors import Code

if TYPE_CHECKING:
    from procs.engine.adapter.decoded import Decoded

ABORT_RETRY_SECONDS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0)
"""Where ranks may hear an abort before its request (pipeline stages, DP attention), it is repeated (dynamo.sglang 1.6.1)."""
SETTLED = ("DYN_SGL_DISAGG_CONFIG", "DYN_SGL_DISAGG_CONFIG_KEY", "DYN_SGL_GATEWAY_WORKERS")
"""What these say is in the arguments already (procs.engine.check)."""
BOOTSTRAP_PORT = "--disaggregation-bootstrap-port"
PREFILLS = ("prefill", "mm_prefill")
OLD_PORT_SECONDS = 12.0
"""Until a dead prefill engine's port is opened again. Decode engines miss it after two heartbeats of 5 s (SGLang 0.5.23); one
that is back before is the old one to them, and their requests wait for its dead ranks for ever."""
SIGQUIT_EXIT = 70
"""Exit code after a child of SGLang reported its own failure by SIGQUIT."""


class SglangBackend:
    """``sgl.Engine`` behind the backend seam (procs.engine.backend.Backend)."""

    def __init__(self, config: NodeConfig, incarnation: int) -> None:
        """Build the engine; blocks for the whole load. Must run in the main thread, outside a running loop:
        elsewhere SGLang skips its signal handlers.
        """
        import sglang as sgl
        from dynamo.sglang.args import parse_args

        started = time.monotonic()
        self._config = config
        self._incarnation = incarnation
        if not config.leads:
            # Otherwise SGLang stays in its constructor for as long as its schedulers live (0.5.23, engine.py).
            os.environ["SGLANG_BLOCK_NONZERO_RANK_CHILDREN"] = "0"
        for name in SETTLED:
            os.environ.pop(name, None)
        self._parsed = asyncio.run(parse_args(config.worker_argv))
        asyncio.set_event_loop(asyncio.new_event_loop())
        if (level := self._parsed.server_args.log_level) != "info":  # --log-level: of the engine and all its processes
            os.environ[log_levels.OURS] = level
        logs.take_back()  # dynamo.sglang has its own configuration, from its import on
        watch_schedulers()
        from procs.engine.adapter import manager

        manager.install()
        self._schedulers = Schedulers()
        shm.mark()
        given = {argument.partition("=")[0] for argument in config.worker_argv}
        if config.role in PREFILLS and incarnation > 1 and BOOTSTRAP_PORT in given:
            time.sleep(max(0.0, OLD_PORT_SECONDS - (time.monotonic() - started)))
        self._engine = sgl.Engine(server_args=self._parsed.server_args)
        self._manager = self._engine.tokenizer_manager
        self._server_args = server_args = self._parsed.use_resolved_server_args(self._engine.server_args)
        seconds = time.monotonic() - started
        if self._manager is not None:
            self.facts = facts.leader(config, self._engine, server_args, self._parsed.dynamo_args, seconds)
            asyncio.set_event_loop(asyncio.new_event_loop())
            self._check_role()
        else:
            self.facts = facts.follower(config, self._engine, server_args, seconds)
        sources = facts.kv_sources(server_args) if config.dynamo.use_kv_events else None
        self.info = kv_sources.say(sources) if sources is not None else {}
        self._requests = Requests()
        self._readers: dict[str, Reader] = {}
        self._sink: Sink | None = None
        self._kv_metrics: KvMetrics | None = None
        self._decoded: Decoded | None = None
        self._repeats_aborts = _repeats_aborts(server_args)

    def _check_role(self) -> None:
        """What only a loaded model shows. Raises ValueError."""
        if self._config.role == "rerank":
            from dynamo.sglang.request_handlers.rerank.rerank_handler import RerankWorkerHandler

            RerankWorkerHandler.validate_engine(self._engine)

    def start(self, sink: Sink, stop: Callable[[], None]) -> None:
        """Raises ValueError for an --engine-route that this engine has no method for."""
        self._sink = sink
        if self._manager is None:  # a follower: its schedulers are all that there is
            _signal_handler_class(stop)
            return
        # SGLang installs its handlers at the first request; its SIGTERM drain polls every 5 s and raises SystemExit
        # into the loop, its SIGQUIT handler blocks the loop for 5 s (facts: TokenizerManager, SignalHandler).
        self._manager.signal_handler_class = _signal_handler_class(stop)
        self._manager.auto_create_handle_loop()
        loop = asyncio.get_running_loop()
        log_levels.on_change = lambda level: loop.call_soon_threadsafe(self._log_level, level)
        self._routes = Routes(self._engine, self._parsed, self._incarnation, self._config.path, sink.serving)
        if hasattr(self._manager, "readers"):  # with several tokenizer workers it is another class
            self._readers = self._manager.readers
            self._manager.step = sink.step
        if self.facts.media:
            from dynamo.sglang._compat import supports_external_mm_hashes

            supports_external_mm_hashes(self._engine)
        asks = Asks(self._engine, self._server_args, self._routes.lora_id_for_name)
        embeddings = None
        if self._config.role.startswith("mm_"):
            mode = self._parsed.dynamo_args.embedding_transfer_mode.value
            embeddings = Embeddings(self._manager, None if self._config.role == "mm_decode" else inbox(mode))
        self._calls = Calls(self._engine, asks, embeddings)
        if self._config.media.frontend_decoding:
            from procs.engine.adapter.decoded import Decoded

            self._decoded = Decoded(self._config.media)
            self._calls.pictures = self._decoded.settle
        if self.facts.traces:
            from sglang.srt.observability.trace import set_global_trace_level

            set_global_trace_level(self._parsed.dynamo_args.sglang_trace_level)
        if getattr(self._engine.port_args, "metrics_ipc_name", None):
            from dynamo.sglang.nixl_telemetry import scheduler_metrics_ipc_name

            name = scheduler_metrics_ipc_name(self._server_args, self._engine.port_args)
            self._kv_metrics = KvMetrics(name, self._incarnation, int(self._server_args.page_size), sink.kv_use)

    async def warm(self) -> None:
        """A prefill engine sends one request through each DP rank: an unwarmed one drops the first real ones.

        Raises TimeoutError after dynamo.sglang's 1,800 s.
        """
        if self._manager is None:
            return
        if self._config.role in PREFILLS:
            from dynamo.sglang._disagg import warmup_prefill_engine

            await warmup_prefill_engine(self._engine, self._server_args.disaggregation_bootstrap_port)
        if self.facts.max_loras is not None:
            await self._routes.reload()
        if hasattr(self._manager, "freeze_gc"):
            # What is loaded stays: the garbage collector of none of SGLang's processes needs to look at it while tokens wait.
            await self._manager.freeze_gc()

    # --- requests ----------------------------------------------------------------------------------------------------

    def submit(self, rid: str, payload: dict[str, Any]) -> None:
        if self._manager is None:
            assert self._sink is not None
            self._sink.failed(rid, Code.INVALID, "requests go to rank 0 of this group")
            return
        if self._routes.asleep:
            assert self._sink is not None
            self._sink.failed(rid, Code.OVERLOADED, "the engine's memory is released; `sgnode wake` takes it again")
            return
        self._requests.begin(rid, self._run(rid, payload))

    def abort(self, rid: str) -> None:
        self._requests.soon(rid, self._abort)

    def _abort(self, rid: str) -> None:
        """SGLang's abort reaches only a request that its scheduler has; one before that is cancelled here.

        So is a batch (its requests have ids of their own) and a session's request, whose id the client chose: SGLang 0.5.23
        aborts by prefix. What of them was dispatched, SGLang aborts by itself then (_release_req_states_on_failure).
        """
        if rid not in self._requests:
            return
        state = self._manager.rid_to_state.get(rid)
        if state is None or not _dispatched(state):
            self._requests.cancel(rid)
            return
        self._manager.abort_request(rid=rid)
        if self._repeats_aborts:
            self._repeat_abort(rid, state, list(ABORT_RETRY_SECONDS))

    def _repeat_abort(self, rid: str, state: Any, delays: list[float]) -> None:
        def again() -> None:
            if self._manager.rid_to_state.get(rid) is state:
                if hasattr(state, "abort_sent"):
                    state.abort_sent = False
                self._manager.abort_request(rid=rid)
                self._repeat_abort(rid, state, delays)

        if delays:
            asyncio.get_running_loop().call_later(delays.pop(0), again)

    async def _run(self, rid: str, payload: dict[str, Any]) -> None:
        """One request: SGLang's stream into the sink, with exactly one end whatever happens."""
        sink = self._sink
        assert sink is not None
        call = payload.get("call", "generate")
        upload = payload.pop("upload", None)
        detokenize = payload.pop("detokenize", call != "generate")
        reader = Reader(rid, call, sink, ids_only=not detokenize)
        if call in BY_THE_STEP and upload is None:
            self._readers[rid] = reader
        try:
            with one_end(rid, sink, _refused):
                async for answer in await self._calls.stream(rid, payload):
                    reader.pass_on(answer if upload is None else await self._upload(answer, upload))
                if not reader.finished:
                    sink.failed(rid, Code.INTERNAL, "SGLang's stream ended without a finish reason")
        finally:
            self._readers.pop(rid, None)

    async def _upload(self, answer: Answer, upload: dict[str, Any]) -> Answer:
        """--enable-rl: a choice's metadata goes to the client's store instead of along with its tokens."""
        from dynamo.common.metadata_upload import MetadataUploader

        info = answer["meta_info"]
        if info["finish_reason"] is not None:
            await MetadataUploader(upload["url"]).upload_choice(upload["index"], info)
        small = {name: info[name] for name in info if "logprobs" not in name and name != "routed_experts"}
        return {**answer, "meta_info": small}

    # --- controls ----------------------------------------------------------------------------------------------------

    async def control(self, op: str, args: dict[str, Any]) -> Any:
        if self._manager is None:
            raise ValueError("engine controls go to rank 0 of this group")
        match op:
            case "route":
                return await self._routes.call(args["path"], args["body"])
            case "load_lora" | "unload_lora" | "list_loras" | "clear_kv_blocks":
                return await self._routes.adapter(op, args.get("body"))
        raise ValueError(f"unknown control {op!r}")

    def _log_level(self, level: int) -> None:
        """SGLang's schedulers and detokenizer follow (0.5.23: TokenizerManager.configure_logging)."""
        from sglang.srt.managers.io_struct import ConfigureLoggingReq

        name = logging.getLevelName(min(level, logging.CRITICAL)).lower()
        self._manager.configure_logging(ConfigureLoggingReq(log_level=name))

    def numbers(self) -> dict[str, float]:
        found = self._schedulers.numbers()
        if hasattr(self._manager, "from_detokenizer"):
            found["from_detokenizer"] = self._manager.from_detokenizer
        return {**found, **facts.transfers()}

    def close(self) -> None:
        if self._kv_metrics is not None:
            self._kv_metrics.close()
        if self._decoded is not None:
            self._decoded.close()
        self._engine.shutdown()


def _refused(error: Exception) -> str | None:
    """SGLang checks lengths and sampling parameters while it tokenises, and media while it loads them."""
    if isinstance(error, (ValueError, TypeError)):
        return media.unreadable(error) or str(error)
    return media.unreadable(error) or None


def _dispatched(state: Any) -> bool:
    """SGLang's scheduler has the request (0.5.23: APIServerReqTimeStats); an SGLang that doesn't say is taken at its word."""
    stats = getattr(state, "time_stats", None)
    return bool(getattr(stats, "api_server_dispatch_finish_time", True))


def _repeats_aborts(server_args: Any) -> bool:
    from dynamo.sglang.capacity import sglang_dp_layout

    local = getattr(server_args, "enable_dp_attention_local_control_broadcast", False)
    return getattr(server_args, "pp_size", 1) > 1 or (bool(sglang_dp_layout(server_args)[1]) and not local)


def _signal_handler_class(stop: Callable[[], None]) -> type:
    """What SGLang calls on SIGTERM and SIGQUIT, instead of its own SignalHandler (managers/tokenizer_manager.py)."""

    class SignalHandler:
        def __init__(self, _manager: Any) -> None: ...

        def sigterm_handler(self, signum: Any = None, frame: Any = None) -> None:
            stop()

        def running_phase_sigquit_handler(self, signum: Any = None, frame: Any = None) -> None:
            logging.error("SIGQUIT: a child of SGLang failed; leaving at once, the keeper frees everything")
            logging.shutdown()
            os._exit(SIGQUIT_EXIT)

    # Before the first request only the launch handler exists: it would kill the tree from inside.
    signal.signal(signal.SIGQUIT, lambda *_: SignalHandler(None).running_phase_sigquit_handler())
    return SignalHandler
