"""An agent's Dynamo identity: runtime, endpoints, model card, load. The only room that talks to Dynamo's runtime."""

import asyncio
import contextlib
import json
import logging
import os
import random
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from dynamo.common.utils.endpoint_types import parse_endpoint_types
from dynamo.common.utils.prometheus import LLMBackendMetrics, register_engine_metrics_callback
from dynamo.common.utils.topology import apply_topology_config
from dynamo.llm import (
    ModelInput,
    ModelRuntimeConfig,
    ModelType,
    WorkerMetricsPublisher,
    WorkerType,
    register_model,
    unregister_model,
    update_model_taints,
)
from dynamo.runtime import DistributedRuntime
from prometheus_client import CollectorRegistry

from procs.agent import decoding
from procs.agent.callee import Callees
from procs.agent.handler import Handler
from procs.agent.pooling_metrics import PoolingMetrics
from procs.agent.store import CARDS, INSTANCES, FileStore
from shared.config import NodeConfig
from shared.errors import NodeError
from shared.frames import EngineFacts, KvUse, Serving, Welcome
from shared.registrations import Registration, hold
from shared.roles import canary, diffusion
from shared.roles.role import Role

CLOSE_SECONDS = 5.0
"""For the endpoints to finish; nothing runs in them any more."""
CARD_GONE_SECONDS = 1.0
"""Between an old card and a new one in a file discovery: Dynamo 1.6.1's frontend, which finds a file there again when it looks,
keeps the old card for ever (3 of 60 swaps without a pause, none of 60 with 0.1 s), and a prefill's old bootstrap port with it."""


class Identity:
    """One worker of the cluster, for the life of this process: its worker id does not change with the engine."""

    def __init__(self, config: NodeConfig, name: str, role: Role, handler: Handler) -> None:
        self._config = config
        self._name = name
        self._role = role
        self._handler = handler
        # Set before the runtime exists: it reads the variable once, and has no way to tell which port 0 became.
        limit = config.dynamo.engine_request_limit
        if limit is not None:
            # The runtime's own admission, one of `agents` parts each.
            os.environ["DYN_ENGINE_REQUEST_LIMIT"] = str(-(-limit // config.agents))
        host = os.environ.setdefault("DYN_SYSTEM_HOST", "127.0.0.1")
        port = _free_port(host)
        os.environ["DYN_SYSTEM_PORT"] = str(port)
        self.metrics_url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}/metrics"
        dynamo = config.dynamo
        self._runtime = DistributedRuntime(
            asyncio.get_running_loop(),
            dynamo.discovery_backend,
            dynamo.request_plane,
            event_plane=dynamo.event_plane,
            response_plane=dynamo.response_plane,
        )
        self._generate = self._runtime.endpoint(f"{dynamo.namespace}.{dynamo.component}.{dynamo.endpoint}")
        worker = self._generate.connection_id()
        self.worker_id = str(worker)
        store = os.environ.get("DYN_FILE_KV", "") if dynamo.discovery_backend == "file" else ""
        try:
            hold(config.path, Registration(name, worker, dynamo.discovery_backend, store))
        except OSError as error:
            words = "should it die, discovery shows it until its lease is over; make room there, then `sgnode restart agent`"
            logging.error("registrations in %s: %s: this agent serves all the same; %s", config.path, error.strerror, words)
        self._store = FileStore(Path(store), dynamo.endpoint, worker) if store else None
        self._serving: list[asyncio.Future[Any]] = []
        self._closing = False
        self._withdrawn = False
        self._card: str = ""
        self._welcome: Welcome | None = None
        self._adapters: dict[str, int] = {}
        """LoRA adapters whose cards are in discovery, with their ids."""
        self._taints: list[str] | None = None
        self._carding = asyncio.Lock()
        self.controls: dict[str, Callable[..., AsyncIterator[dict[str, Any]]]] = {}
        """Handlers of the worker's other endpoints, by name."""
        self.ended = ""
        """Why Dynamo's runtime serves no longer; empty while it does."""
        self.on_end: Callable[[], None] = lambda: None
        self._load: WorkerMetricsPublisher | None = None
        self._gauges: LLMBackendMetrics | None = None
        """The engine's gauges. Only the first agent shows them: a sum over workers must count the engine once."""

    async def register(self, welcome: Welcome) -> None:
        """Put this worker into discovery: the first time with endpoints and card, afterwards the instance again.

        A card whose facts have changed with the engine is replaced; ``register_endpoint_instance`` alone keeps the old one.
        """
        self._welcome = welcome
        if not self._serving:
            await self._serve(welcome.facts)
        card = _card_key(welcome.facts)
        if self._card and self._expired(CARDS):
            self._card = ""
        if card != self._card:
            if self._card:
                logging.info("the engine's facts have changed: replacing the model card")
                self._card = ""
                for name in list(self._adapters):
                    await self.revoke(name)
                await unregister_model(self._generate)
                if self._store is not None:
                    await asyncio.sleep(CARD_GONE_SECONDS)
            await self._register_model(welcome)
            self._card, self._taints = card, None
        if self._withdrawn or self._expired(INSTANCES):
            await self._generate.register_endpoint_instance()
            self._withdrawn = False
        if self._gauges is not None:
            self._gauges.set_model_load_time(welcome.facts.load_seconds)

    async def follow(self, serving: Serving) -> None:
        """Make adapters' cards and the card's taints what the engine says. Raises what discovery raises."""
        steps = [self.revoke(name) for name in self._adapters.keys() - serving.adapters.keys()]
        steps += [self.publish(name, number) for name, number in serving.adapters.items()]
        # One card that discovery refuses must not hold up the others.
        failed = [found for found in await asyncio.gather(*steps, return_exceptions=True) if found is not None]
        if failed:
            raise failed[0]
        if serving.taints is not None and serving.taints != self._taints:
            await update_model_taints(self._generate, set(serving.taints))
            self._taints = serving.taints

    def follows(self, serving: Serving) -> bool:
        """Nothing is to be done for it."""
        return serving.adapters == self._adapters and serving.taints in (None, self._taints)

    async def publish(self, adapter: str, number: int) -> None:
        """Put a LoRA adapter's card into discovery, once (dynamo.sglang 1.6.1, LoraMixin.load_lora)."""
        async with self._carding:
            if adapter in self._adapters:
                return
            assert self._welcome is not None
            facts = self._welcome.facts
            await register_model(
                ModelInput.Tokens,
                self._model_type(),
                self._generate,
                facts.model_path,
                kv_cache_block_size=facts.block_size,
                runtime_config=self._runtime_config(facts),
                user_data={"lora_adapter": True, "lora_id": number},
                lora_name=adapter,
                base_model_path=facts.model_path,
                worker_type=getattr(WorkerType, self._role.worker_type),
                needs=self._needs,
                ignore_weights=True,
                max_gpu_lora_count=facts.max_loras,
            )
            self._adapters[adapter] = number
            logging.info("adapter %s is in discovery", adapter)

    async def revoke(self, adapter: str) -> None:
        """Take a LoRA adapter's card out of discovery."""
        async with self._carding:
            if adapter in self._adapters:
                await unregister_model(self._generate, lora_name=adapter)
                del self._adapters[adapter]
                logging.info("adapter %s is out of discovery", adapter)

    @property
    def adapters(self) -> list[str]:
        return sorted(self._adapters)

    async def withdraw(self) -> None:
        """Take this instance out of discovery; requests that a router sent already are still served."""
        if not self._expired(INSTANCES):  # Dynamo calls it an error then
            await self._generate.unregister_endpoint_instance()
        self._withdrawn = True

    def lost(self) -> bool:
        """A record of this worker was expired by others: it has to be registered again."""
        return self._expired(INSTANCES) or self._expired(CARDS)

    def store_trouble(self) -> str:
        """Why that may happen soon; empty when it won't, and with any backend but files."""
        return self._store.trouble() if self._store is not None else ""

    def _expired(self, kind: str) -> bool:
        return self._store is not None and bool(self._serving) and not self._store.has(kind)

    def publish_load(self, use: KvUse) -> None:
        """KV use of one DP rank, under this worker's identity: a router takes it from nobody else."""
        if self._load is not None:
            self._load.publish(use.dp_rank, kv_used_blocks=use.used_blocks)
        if self._gauges is not None:
            self._gauges.set_total_blocks(str(use.dp_rank), use.total_blocks)
            self._gauges.set_gpu_cache_usage(str(use.dp_rank), use.usage)

    async def close(self) -> None:
        """Leave the cluster. An endpoint is done when its last chunks have left for the frontend: exiting earlier loses them."""
        self._closing = True
        self._runtime.shutdown()
        if self._serving:
            await asyncio.wait(self._serving, timeout=CLOSE_SECONDS)

    def _served(self, serving: "asyncio.Future[Any]") -> None:
        if self._closing or serving.cancelled():
            return
        self.ended = str(serving.exception() or "an endpoint is not served any more")
        self.on_end()

    async def _measure(self, facts: EngineFacts) -> None:
        """This worker's metrics and load. A pooling engine has no KV cache to speak of (dynamo.sglang, setup_sgl_metrics)."""
        registry, dynamo = CollectorRegistry(), self._config.dynamo
        if self._role.name == "embedding":
            register_engine_metrics_callback(
                endpoint=self._generate,
                registry=registry,
                metric_prefix_filters=["dynamo_embedding_"],
                namespace_name=dynamo.namespace,
                component_name=dynamo.component,
                endpoint_name=dynamo.endpoint,
                model_name=facts.served_model_name,
            )
            self._handler.on_chunk = PoolingMetrics(registry).observe
        if not self._role.generates:
            return
        self._handler.latency.model = facts.served_model_name
        registry.register(self._handler.latency)
        if self._name == self._config.agent_names[0]:  # as child 0 of dynamo.sglang's gateway (publisher.py)
            register_engine_metrics_callback(endpoint=self._generate, registry=registry)
            self._gauges = LLMBackendMetrics(registry, facts.served_model_name, dynamo.component)
        self._load = WorkerMetricsPublisher()
        await self._load.create_endpoint(self._generate)
        for rank in range(facts.dp_start, facts.dp_start + facts.dp_size):
            self._load.publish(rank, kv_used_blocks=0)
            if self._gauges is not None:
                self._gauges.set_total_blocks(str(rank), facts.total_kv_blocks or 0)
                self._gauges.set_gpu_cache_usage(str(rank), 0.0)

    async def _serve(self, facts: EngineFacts) -> None:
        await self._measure(facts)
        if self._role.generates and self._role.worker_type != "Prefill":
            worker_type = getattr(WorkerType, self._role.worker_type)
            self._handler.first_token_source = await self._generate.first_token_source(worker_type)
        dynamo = self._config.dynamo
        if self._role.callee is not None:
            name = f"{dynamo.namespace}.{self._role.callee.component}.generate"
            self._handler.callees = Callees(name, await self._runtime.endpoint(name).client())
        self._serve_endpoint(self._generate, self._handler.endpoint, facts, health_check_payload=self._canary(facts))
        for name, handler in self.controls.items() if self._role.generates else ():
            self._serve_endpoint(self._runtime.endpoint(f"{dynamo.namespace}.{dynamo.component}.{name}"), handler, facts)

    def _serve_endpoint(self, endpoint: Any, handler: Callable[..., Any], facts: EngineFacts, **extra: Any) -> None:
        labels = [("model", facts.served_model_name)]
        serving = asyncio.ensure_future(endpoint.serve_endpoint(handler, graceful_shutdown=True, metrics_labels=labels, **extra))
        serving.add_done_callback(self._served)
        self._serving.append(serving)

    def _canary(self, facts: EngineFacts) -> dict[str, Any]:
        """For Dynamo's own health check of the endpoint (DYN_HEALTH_CHECK_ENABLED)."""
        return canary.request(self._role, facts, self._config.health_check_payload)

    async def _register_model(self, welcome: Welcome) -> None:
        facts, dynamo = welcome.facts, self._config.dynamo
        await register_model(
            getattr(ModelInput, self._role.model_input),
            self._model_type(),
            self._generate,
            dynamo.model_source_uri or facts.model_path,
            facts.served_model_name,
            worker_type=getattr(WorkerType, self._role.worker_type),
            needs=self._needs,
            router_config=_router_config(self._config.worker_argv),
            model_aliases=dynamo.served_model_aliases or None,
            **decoding.card(self._config.media),
            **self._card_of_tokens(facts),
        )

    def _card_of_tokens(self, facts: EngineFacts) -> dict[str, Any]:
        """What of a card is about tokens and their cache; nothing for images and videos."""
        if self._role.engine == diffusion.ENGINE:
            return {}
        return {
            "kv_cache_block_size": facts.block_size,
            "runtime_config": self._runtime_config(facts),
            "custom_template_path": self._config.dynamo.custom_jinja_template,
            "max_gpu_lora_count": facts.max_loras,
        }

    @property
    def _needs(self) -> list[list[WorkerType]]:
        return [[getattr(WorkerType, name) for name in group] for group in self._role.needs]

    def _model_type(self) -> ModelType:
        name = self._role.model_type
        return getattr(ModelType, name) if name else parse_endpoint_types(self._config.dynamo.endpoint_types)

    def _runtime_config(self, facts: EngineFacts) -> ModelRuntimeConfig:
        """The card's runtime configuration, as dynamo.sglang 1.6.1 fills it (register.py, get_runtime_config)."""
        dynamo = self._config.dynamo
        config = ModelRuntimeConfig()
        config.context_length = facts.context_length
        sizes = (facts.total_kv_blocks, facts.max_running_requests, facts.max_num_batched_tokens)
        for name, size in zip(("total_kv_blocks", "max_num_seqs", "max_num_batched_tokens"), sizes, strict=True):
            if size is not None:  # SGLang 0.5.16 does not say how many requests it runs
                setattr(config, name, size)
        config.data_parallel_start_rank = facts.dp_start
        config.data_parallel_size = facts.dp_size
        config.kv_state_endpoint = dynamo.kv_state_endpoint
        config.tool_call_parser = dynamo.tool_call_parser
        config.reasoning_parser = dynamo.reasoning_parser
        config.exclude_tools_when_tool_choice_none = dynamo.exclude_tools_when_tool_choice_none
        config.set_structural_tag(dynamo.structural_tag)
        if facts.bootstrap_host and facts.bootstrap_port:
            config.set_disaggregated_endpoint(facts.bootstrap_host, facts.bootstrap_port)
        # What the engine's facts say more exactly.
        config.enable_local_indexer = dynamo.enable_local_indexer and self._role.worker_type != "Decode"
        config.kv_event_publishing_enabled = False
        for name, value in facts.runtime_config.items():
            setattr(config, name, value)
        for name, text in facts.runtime_data.items():
            config.set_engine_specific(name, text)
        if dynamo.default_thinking_mode is not None:
            config.set_engine_specific("default_thinking_mode", json.dumps(dynamo.default_thinking_mode))
        if self._config.agents > 1:
            # N instances over one engine must count as one engine's capacity (dynamo.sglang, gateway.py).
            # Without the incarnation: an agent that comes back later must name the same engine as its siblings' cards do.
            engine = f"{socket.gethostname()}:{self._config.runtime_dir}"
            config.set_engine_specific("dynamo.sglang.gateway_engine", json.dumps(engine))
            config.set_engine_specific("dynamo.sglang.gateway_workers", json.dumps(self._config.agents))
        apply_topology_config(config)
        return config


def _router_config(argv: list[str]) -> Any:
    """--router-mode on a worker: how it wants to be routed to. None: as the frontend does."""
    if "DYN_ROUTER_MODE" not in os.environ and not any(argument.startswith("--router-mode") for argument in argv):
        return None
    # Imported only where there is something to parse: it is 5 MB.
    from dynamo.common.configuration.groups.router_args import build_router_config, parse_worker_router_config

    return build_router_config(parse_worker_router_config(argv)[0])


def _card_key(facts: EngineFacts) -> str:
    """What of the facts is on the card, as text to compare."""
    skip = ("load_seconds", "metrics_dir", "version")
    return json.dumps({name: getattr(facts, name) for name in facts.__struct_fields__ if name not in skip}, sort_keys=True)


def _free_port(host: str) -> int:
    """A free port below the ephemeral range: Dynamo 1.6.1 reads DYN_SYSTEM_PORT as a signed 16-bit number."""
    for port in random.sample(range(20_000, 32_768), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise NodeError("no free port between 20000 and 32767 for an agent's metrics")
