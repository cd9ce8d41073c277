"""What a built engine says of itself: its facts for the model card, and where its KV events are."""

import asyncio
import json
import logging
import os
import sys
from typing import Any

from procs.engine.adapter import media
from shared import roles
from shared.config import NodeConfig
from shared.frames import EngineFacts
from shared.kv_sources import KvSource, KvSources

WILDCARDS = ("tcp://*", "tcp://0.0.0.0", "tcp://::", "tcp://[::]")


def leader(config: NodeConfig, engine: Any, server_args: Any, dynamo_args: Any, load_seconds: float) -> EngineFacts:
    """Facts of a built engine. The model card's entries are those of dynamo.sglang's own get_runtime_config (1.6.1)."""
    import sglang
    from dynamo.sglang.capacity import kv_event_block_size, runtime_capacity
    from dynamo.sglang.engine_generate import SGLANG_GENERATE_CAPABILITY
    from dynamo.sglang.register import get_runtime_config
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    card = asyncio.run(get_runtime_config(engine, server_args, dynamo_args))
    assert card is not None
    role = roles.find(config.role, text=config.text_mode)
    data = {name: value if isinstance(value, str) else json.dumps(value) for name, value in card.runtime_data.items()}
    if role.generates and role.model_input == "Tokens":
        data[SGLANG_GENERATE_CAPABILITY] = json.dumps(True)
    manager = engine.tokenizer_manager
    model = manager.model_config
    infos = engine._scheduler_init_result.scheduler_infos
    info = infos[0] if infos else {}
    eos = getattr(model, "hf_eos_token_id", None) or ()
    lora = role.generates and bool(getattr(server_args, "enable_lora", None) or getattr(server_args, "lora_paths", None))
    return EngineFacts(
        role=config.role,
        engine="sglang",
        version=sglang.__version__,
        model_path=_card_path(model, server_args),
        served_model_name=server_args.served_model_name,
        vocab_size=int(model.vocab_size),
        context_length=int(manager.context_len),
        block_size=kv_event_block_size(server_args),
        total_kv_blocks=card.total_kv_blocks,
        max_running_requests=runtime_capacity(server_args, info).max_num_seqs or info.get("max_running_requests"),
        max_num_batched_tokens=card.max_num_batched_tokens,
        dp_start=card.data_parallel_start_rank,
        dp_size=card.data_parallel_size,
        bos_token_id=getattr(manager.tokenizer, "bos_token_id", None),
        eos_token_ids=sorted(int(token) for token in eos),
        load_seconds=load_seconds,
        runtime_config={
            "kv_event_publishing_enabled": card.kv_event_publishing_enabled,
            "enable_local_indexer": card.enable_local_indexer,
            "enable_eagle": card.enable_eagle,
        },
        runtime_data=data,
        metrics_dir=os.environ.get("PROMETHEUS_MULTIPROC_DIR") if server_args.enable_metrics else None,
        bootstrap_host=_bootstrap_host(card.bootstrap_host, server_args),
        bootstrap_port=card.bootstrap_port,
        fake_bootstrap_host=FAKE_BOOTSTRAP_HOST,
        skip_tokenizer_init=bool(server_args.skip_tokenizer_init),
        traces=bool(getattr(server_args, "enable_trace", False)),
        uploads=bool(getattr(dynamo_args, "enable_rl", False)),
        max_loras=getattr(server_args, "max_loras_per_batch", None) if lora else None,
        media=media.kinds(manager) if role.takes_media else [],
    )


def _bootstrap_host(found: str | None, server_args: Any) -> str | None:
    """Where a prefill's bootstrap server is reached: the address that it listens on, unless it listens on all.

    dynamo.sglang advertises an outward address in any case, which nothing answers at while SGLang listens on loopback.
    """
    from sglang.srt.utils.network import NetworkAddress

    host = server_args.host
    if found is None or not host or host in ("0.0.0.0", "::", "[::]"):
        return found
    if server_args.disaggregation_mode == "prefill" and host in ("127.0.0.1", "localhost", "::1", "[::1]"):
        logging.warning("prefill listens on %s: decode engines of other machines need --host 0.0.0.0 here", host)
    return str(NetworkAddress(host.strip("[]"), 0).to_host_port_str()).rpartition(":")[0]


def follower(config: NodeConfig, engine: Any, server_args: Any, load_seconds: float) -> EngineFacts:
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


def kv_sources(server_args: Any) -> KvSources | None:
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


def transfers() -> dict[str, float]:
    """What NIXL does in this process, for the Beat; nothing where nobody has asked for it."""
    nixl = sys.modules.get("procs.engine.adapter.nixl")
    return nixl.numbers() if nixl is not None else {}


def _card_path(model: Any, server_args: Any) -> str:
    """Where the model card's files are: after a remote pull SGLang keeps them in a local directory (ModelConfig)."""
    return str(model.model_path if getattr(model, "model_weights", None) else server_args.model_path)
