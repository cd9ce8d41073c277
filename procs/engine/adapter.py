"""The one module that knows SGLang's internals. It probes for what it uses and never compares versions.

Tested with SGLang 0.5.23 on CPU; written against 0.5.16 too. Sources are named where a private attribute is used.
"""

import asyncio
import inspect
import json
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from procs.engine.backend import Sink
from shared import kv_sources
from shared.config import NodeConfig
from shared.errors import Code
from shared.frames import EngineFacts, KvUse
from shared.kv_sources import KvSource, KvSources
from shared.sockets import LoopSocket

META = ("prompt_tokens", "completion_tokens", "cached_tokens")
"""meta_info entries that a first and a last output carry."""
LOGPROB_META = ("output_token_logprobs", "output_top_logprobs", "input_token_logprobs", "input_top_logprobs")
"""meta_info entries that go along whenever SGLang fills them."""
ABORT_RETRY_SECONDS = 0.005
"""An abort that comes before SGLang knows the request is repeated until it does."""
WILDCARDS = ("tcp://*", "tcp://0.0.0.0", "tcp://::", "tcp://[::]")
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
        self._incarnation = incarnation
        if not config.leads:
            # Otherwise SGLang stays in its constructor for as long as its schedulers live (0.5.23, engine.py).
            os.environ["SGLANG_BLOCK_NONZERO_RANK_CHILDREN"] = "0"
        parsed = asyncio.run(parse_args(config.worker_argv))
        asyncio.set_event_loop(asyncio.new_event_loop())
        self._engine = sgl.Engine(server_args=parsed.server_args)
        self._manager = self._engine.tokenizer_manager
        server_args = parsed.use_resolved_server_args(self._engine.server_args)
        make = _facts if self._manager is not None else _follower_facts
        self.facts = make(config, self._engine, server_args, time.monotonic() - started)
        sources = _kv_sources(server_args) if config.dynamo.use_kv_events else None
        self.info = kv_sources.say(sources) if sources is not None else {}
        self._parameters = frozenset(inspect.signature(self._engine.async_generate).parameters)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sink: Sink | None = None
        self._kv_metrics: LoopSocket | None = None
        self._block_size = int(server_args.page_size)

    def start(self, sink: Sink, stop: Callable[[], None]) -> None:
        self._sink = sink
        if self._manager is None:  # a follower: its schedulers are all that there is
            _signal_handler_class(stop)
            return
        # SGLang installs its handlers at the first request; its SIGTERM drain polls every 5 s and raises SystemExit
        # into the loop, its SIGQUIT handler blocks the loop for 5 s (facts: TokenizerManager, SignalHandler).
        self._manager.signal_handler_class = _signal_handler_class(stop)
        self._manager.auto_create_handle_loop()
        self._bind_kv_metrics()

    # --- requests ----------------------------------------------------------------------------------------------------

    def submit(self, rid: str, payload: dict[str, Any]) -> None:
        if self._manager is None:
            assert self._sink is not None
            self._sink.failed(rid, Code.INVALID, "requests go to rank 0 of this group")
            return
        unknown = payload.keys() - self._parameters
        if "routed_dp_rank" in unknown and "data_parallel_rank" in self._parameters:
            payload["data_parallel_rank"] = payload.pop("routed_dp_rank")
            unknown.discard("routed_dp_rank")
        if unknown or "rid" in payload or "stream" in payload:
            assert self._sink is not None
            names = ", ".join(sorted(unknown)) or "rid, stream"
            self._sink.failed(rid, Code.INVALID, f"not supported by this engine: {names}")
            return
        task = asyncio.get_running_loop().create_task(self._run(rid, payload))
        self._tasks[rid] = task
        task.add_done_callback(lambda _: self._tasks.pop(rid, None))

    def abort(self, rid: str) -> None:
        if rid not in self._tasks:
            return
        if rid in self._manager.rid_to_state:
            self._manager.abort_request(rid=rid)
        else:
            asyncio.get_running_loop().call_later(ABORT_RETRY_SECONDS, self.abort, rid)

    async def _run(self, rid: str, payload: dict[str, Any]) -> None:
        """One request: SGLang's stream into the sink, with exactly one end whatever happens."""
        sink = self._sink
        assert sink is not None
        first = True
        finish: dict[str, Any] | None = None
        try:
            chunks = await self._engine.async_generate(**payload, rid=rid, stream=True)
            async for chunk in chunks:
                info = chunk["meta_info"]
                finish = info["finish_reason"]
                meta = None
                if first or finish is not None:
                    meta = {name: info.get(name) for name in META}
                if info.get("output_token_logprobs") or (meta is not None and info.get("input_token_logprobs")):
                    meta = {**(meta or {}), **{name: info[name] for name in LOGPROB_META if info.get(name)}}
                tokens = chunk.get("output_ids") or []
                if tokens or finish is not None:
                    first = False
                    sink.output(rid, list(tokens), finish, meta)
        except (ValueError, TypeError) as error:
            # SGLang checks lengths and sampling parameters while it tokenises, and raises these.
            sink.failed(rid, Code.INVALID, str(error))
        except asyncio.CancelledError:
            sink.failed(rid, Code.ENGINE_DEAD, "the engine is stopping")
            raise
        except Exception as error:
            logging.exception("request %s", rid)
            sink.failed(rid, Code.INTERNAL, f"{type(error).__name__}: {error}")
        else:
            if finish is None:
                sink.failed(rid, Code.INTERNAL, "SGLang's stream ended without a finish reason")

    # --- controls ----------------------------------------------------------------------------------------------------

    async def control(self, op: str, args: dict[str, Any]) -> Any:
        if self._manager is None:
            raise ValueError("engine controls go to rank 0 of this group")
        if op == "flush_cache":
            answer = await self._manager.flush_cache()
            if not getattr(answer, "success", True):
                raise RuntimeError("SGLang did not flush: requests are running")
            return {"flushed": True}
        raise ValueError(f"unknown control {op!r}")

    def close(self) -> None:
        if self._kv_metrics is not None:
            self._kv_metrics.close()
        self._engine.shutdown()

    # --- KV use ------------------------------------------------------------------------------------------------------

    def _bind_kv_metrics(self) -> None:
        """Take SGLang's KvMetrics: its scheduler connects a PUSH and sends only with metrics and KV events both on."""
        name = getattr(self._engine.port_args, "metrics_ipc_name", None)
        if not name:
            return
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        sock = context.socket(zmq.PULL)
        sock.setsockopt(zmq.LINGER, 0)
        sock.bind(name)
        self._kv_metrics = LoopSocket(sock, self._kv_metrics_message)

    def _kv_metrics_message(self, parts: list[bytes]) -> None:
        assert self._sink is not None
        try:
            metrics = _decode_kv_metrics(parts[0])
            use = KvUse(
                incarnation=self._incarnation,
                dp_rank=int(metrics["data_parallel_rank"] or 0),
                used_blocks=-(-int(metrics["kv_active_blocks"]) // self._block_size),
                total_blocks=-(-int(metrics["kv_total_blocks"]) // self._block_size),
                waiting=int(metrics["num_requests_waiting"]),
                usage=float(metrics["gpu_cache_usage_perc"]),
                prefix_hit_rate=float(metrics["gpu_prefix_cache_hit_rate"]),
            )
        except Exception as error:  # a metrics message never ends the engine
            logging.warning("KvMetrics not understood: %s", error)
            return
        self._sink.kv_use(use)


def _decode_kv_metrics(data: bytes) -> dict[str, Any]:
    """SGLang's KvMetrics by field name. Its "blocks" are tokens (0.5.23).

    The frame is a pickle unless SGLANG_USE_PICKLE_IPC=0. It comes from our own child over a socket file in a directory
    of mode 0700, the same channel over which SGLang's own processes exchange pickles.
    """
    fields = (
        "request_active_slots", "request_total_slots", "kv_active_blocks", "kv_total_blocks", "num_requests_waiting",
        "gpu_cache_usage_perc", "gpu_prefix_cache_hit_rate", "data_parallel_rank",
    )  # fmt: skip
    if data[:1] == b"\x80":
        import pickle

        loaded = pickle.loads(data)
        return {name: getattr(loaded, name, 0) for name in fields}
    values = msgspec.msgpack.decode(data)
    return dict(zip(fields, values[1:], strict=False))


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


def _facts(config: NodeConfig, engine: Any, server_args: Any, load_seconds: float) -> EngineFacts:
    """Facts of a built engine, with the capacity arithmetic of dynamo.sglang 1.6.1 (capacity.py, register.py)."""
    import sglang
    from dynamo.sglang._disagg import SGLANG_WORKER_GROUP_ID_KEY, get_sglang_worker_group_id
    from dynamo.sglang.capacity import (
        get_hicache_native_offloading_capacity,
        get_spec_decode_runtime_data,
        kv_event_block_size,
        model_card_dp_rank_bounds,
        runtime_capacity,
    )

    manager = engine.tokenizer_manager
    model = manager.model_config
    infos = engine._scheduler_init_result.scheduler_infos
    info = infos[0] if infos else {}
    capacity = runtime_capacity(server_args, info)
    dp_start, dp_end = model_card_dp_rank_bounds(server_args)
    tokenizer = manager.tokenizer
    eos = getattr(model, "hf_eos_token_id", None) or ()
    data: dict[str, str] = {}
    auto_truncate = bool(getattr(server_args, "allow_auto_truncate", False))
    data["token_budget"] = json.dumps(
        {
            "combined_limit": max(0, manager.context_len - getattr(manager, "num_reserved_tokens", 0)),
            "reject_prompt_overflow": not auto_truncate,
            "reject_total_overflow": bool(getattr(manager, "validate_total_tokens", False)) and not auto_truncate,
        }
    )
    if (group := get_sglang_worker_group_id(server_args)) is not None:
        data[SGLANG_WORKER_GROUP_ID_KEY] = json.dumps(group)
    speculative = get_spec_decode_runtime_data(server_args)
    if speculative is not None:
        data["spec_decode"] = json.dumps(speculative)
    offloading = get_hicache_native_offloading_capacity(server_args, info)
    if offloading is not None:
        from dynamo.common.native_offloading import NATIVE_OFFLOADING_CAPACITY_RUNTIME_KEY

        data[NATIVE_OFFLOADING_CAPACITY_RUNTIME_KEY] = json.dumps(offloading)
    metrics_dir = os.environ.get("PROMETHEUS_MULTIPROC_DIR") if server_args.enable_metrics else None
    return EngineFacts(
        role=config.role,
        engine="sglang",
        version=sglang.__version__,
        model_path=_card_path(model, server_args),
        served_model_name=server_args.served_model_name,
        vocab_size=int(model.vocab_size),
        context_length=int(manager.context_len),
        block_size=kv_event_block_size(server_args),
        total_kv_blocks=capacity.total_kv_blocks,
        max_running_requests=capacity.max_num_seqs or info.get("max_running_requests"),
        max_num_batched_tokens=capacity.max_num_batched_tokens,
        dp_start=dp_start,
        dp_size=dp_end - dp_start,
        bos_token_id=getattr(tokenizer, "bos_token_id", None),
        eos_token_ids=sorted(int(token) for token in eos),
        load_seconds=load_seconds,
        runtime_config={
            "kv_event_publishing_enabled": config.dynamo.use_kv_events,
            **({"enable_eagle": True} if _is_eagle(server_args) else {}),
        },
        runtime_data=data,
        metrics_dir=metrics_dir,
    )


def _follower_facts(config: NodeConfig, engine: Any, server_args: Any, load_seconds: float) -> EngineFacts:
    """A follower has no tokenizer and answers nobody: what its schedulers say, and where their metrics are."""
    import sglang
    from dynamo.sglang.capacity import kv_event_block_size, local_dp_rank_bounds, runtime_capacity

    infos = engine._scheduler_init_result.scheduler_infos
    start, end = local_dp_rank_bounds(server_args)
    return EngineFacts(
        role=config.role,
        engine="sglang",
        version=sglang.__version__,
        model_path=str(server_args.model_path),
        served_model_name=server_args.served_model_name,
        vocab_size=0,
        context_length=0,
        block_size=kv_event_block_size(server_args),
        total_kv_blocks=runtime_capacity(server_args, infos[0] if infos else {}).total_kv_blocks,
        max_running_requests=None,
        max_num_batched_tokens=None,
        dp_start=start,
        dp_size=end - start,
        bos_token_id=None,
        eos_token_ids=[],
        load_seconds=load_seconds,
        metrics_dir=os.environ.get("PROMETHEUS_MULTIPROC_DIR") if server_args.enable_metrics else None,
    )


def _kv_sources(server_args: Any) -> KvSources | None:
    """Where the KV events of this node's DP ranks are; None on a follower that shares the leader's rank (capacity.py)."""
    from dynamo.sglang.capacity import kv_event_block_size, local_dp_rank_bounds, publishes_kv_events
    from sglang.srt.disaggregation.kv_events import KVEventsConfig, ZmqEventPublisher

    if not publishes_kv_events(server_args):
        return None
    given = KVEventsConfig.from_cli(server_args.kv_events_config)

    def address(endpoint: str | None, rank: int) -> str | None:
        """Where to connect: one port a rank; what listens everywhere is reached on loopback."""
        if not endpoint:
            return None
        host, _, port = str(ZmqEventPublisher.offset_endpoint_port(endpoint, rank)).rpartition(":")
        return f"{'tcp://127.0.0.1' if host in WILDCARDS else host}:{port}"

    ranks = {}
    for rank in range(*local_dp_rank_bounds(server_args)):
        events = address(given.endpoint, rank)
        assert events is not None
        ranks[rank] = KvSource(events, address(given.replay_endpoint, rank))
    return KvSources(kv_event_block_size(server_args), ranks)


def _card_path(model: Any, server_args: Any) -> str:
    """Where the model card's files are: after a remote pull SGLang keeps them in a local directory (ModelConfig)."""
    return str(model.model_path if getattr(model, "model_weights", None) else server_args.model_path)


def _is_eagle(server_args: Any) -> bool:
    """The router must align its block hashes to bigrams for EAGLE-like algorithms (dynamo.sglang, register.py)."""
    try:
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        return bool(SpeculativeAlgorithm.from_string(server_args.speculative_algorithm).is_eagle())
    except (ImportError, ValueError, AttributeError):
        return False
