"""The node's resolved configuration: plain values in ``node.json``, and the layout of the runtime directory.

Written once by ``sgnode serve`` before anything starts; every process reads it and nothing else.
"""

import os
from pathlib import Path
from typing import Any

import msgspec

from shared.errors import NodeError

RUNTIME_DIR_VARIABLE = "SGNODE_RUNTIME_DIR"
"""Environment variable that names the runtime directory; also the marker by which a node's processes are found."""


class Dynamo(msgspec.Struct, frozen=True, kw_only=True):
    """How an agent joins the cluster. Field names and defaults follow Dynamo 1.6.1's runtime arguments."""

    namespace: str = "dynamo"
    component: str = "backend"
    endpoint: str = "generate"
    discovery_backend: str = "file"
    request_plane: str = "tcp"
    response_plane: str | None = None
    event_plane: str | None = "zmq"
    endpoint_types: str = "chat,completions"
    custom_jinja_template: str | None = None
    served_model_aliases: list[str] = []
    model_source_uri: str | None = None
    kv_state_endpoint: str | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    default_thinking_mode: str | None = None
    exclude_tools_when_tool_choice_none: bool = True
    structural_tag: dict[str, Any] | None = None
    enable_local_indexer: bool = True
    use_kv_events: bool = False
    engine_request_limit: int | None = None
    media_output_fs_url: str = "file:///tmp/dynamo_media"
    media_output_http_url: str | None = None


class Synthetic(msgspec.Struct, frozen=True, kw_only=True):
    """The synthetic engine's dials (tests and ceilings only). Times in seconds."""

    load_seconds: float = 0.2
    step_seconds: float = 0.01
    tokens_per_step: int = 1
    total_kv_blocks: int = 4096
    max_running_requests: int = 1024
    vocab_size: int = 512
    context_length: int = 1_000_000
    fault: str = ""
    """``load``: die while loading; ``hang``: stop stepping; empty: none. Others at run time (procs/engine/synthetic.py)."""
    children: int = 2
    """Child processes, standing where SGLang has its scheduler and detokenizer."""


class MediaLimits(msgspec.Struct, frozen=True):
    """Bounds of what clients may send as images, videos, audio. An item: DYN_MM_MAX_FILE_SIZE_MB, DYN_MM_MAX_DATA_URL_MB."""

    max_items: int = 32
    """Of one request."""
    per_kind: dict[str, int] = {}
    """The same for each kind (SGLang's --limit-mm-data-per-request)."""
    max_pixels: int = 64_000_000
    """Of one image: it takes 3 bytes each, decoded."""
    timeout: float = 30.0
    """Seconds to fetch one item."""
    memory_bytes: int = 1 << 30
    """All that an agent may hold at a time for requests that the engine has not answered."""
    domains: list[str] = []
    """Where media may come from (SGLang's --allowed-media-domains); empty: from any public address."""
    frontend_decoding: bool = False
    """Images come decoded, out of the frontend's memory (--frontend-decoding)."""


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One node. Ports are resolved (never 0). Durations in seconds."""

    name: str
    runtime_dir: str
    version: str
    role: str
    model_path: str
    served_model_name: str
    engine: str = "sglang"
    worker_argv: list[str] = []
    """Arguments for SGLang and Dynamo's worker as the user gave them, the YAML file already merged in."""
    synthetic: Synthetic | None = None
    dynamo: Dynamo = Dynamo()
    text_mode: bool = False
    """--use-sglang-tokenizer: text goes to the engine and comes from it."""
    enable_metrics: bool = False
    tp_size: int = 1
    dp_size: int = 1
    pp_size: int = 1
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: str | None = None
    group_port: int | None = None
    group_key_file: str | None = None
    group_deadline: float = 2.0
    """Seconds without a sign of life of another rank that end an epoch."""
    group_facts: dict[str, str] = {}
    """What must be alike on every rank, by name (procs.engine.check)."""
    gpu_ids: list[int] | None = None
    """Which of the visible GPUs the engine takes on this rank; None: not known."""
    node_id: str = ""
    """Of this life of the node: another one each time `sgnode serve` runs."""
    begun: float = 0.0
    """UNIX seconds: `sgnode serve` was started."""
    checked: float = 0.0
    """UNIX seconds: the configuration was found to be right."""
    agents: int = 1
    frontend: bool = True
    http_host: str = "127.0.0.1"
    http_port: int = 8000
    system_host: str = "127.0.0.1"
    system_port: int = 9090
    drain_grace: float = 5.0
    drain_timeout: float = 300.0
    hang_timeout: float = 300.0
    canary_wait: float = 10.0
    canary_timeout: float = 30.0
    busy_stall: float = 60.0
    """For one step of SGLang's scheduler."""
    canaries: bool = True
    """DYN_HEALTH_CHECK_ENABLED=false: each engine's first canaries only."""
    health_check_payload: dict[str, Any] | None = None
    """The operator's canary, as a request of Dynamo's."""
    media: MediaLimits = MediaLimits()
    health_path: str = "/health"
    live_path: str = "/live"
    starting_status: str = "notready"
    """What /health says before an engine was judged."""

    @property
    def path(self) -> Path:
        return Path(self.runtime_dir)

    @property
    def leads(self) -> bool:
        """This node has the agents and the frontend."""
        return self.node_rank == 0

    @property
    def group_address(self) -> tuple[str, int]:
        """Host and port where the leader's coordinator listens. Only with ``nnodes`` > 1."""
        assert self.dist_init_addr is not None and self.group_port is not None
        return split_address(self.dist_init_addr)[0], self.group_port

    @property
    def agent_names(self) -> list[str]:
        """Process names of the agents; a follower has none."""
        return [f"agent:{i}" for i in range(self.agents)] if self.node_rank == 0 else []

    @property
    def processes(self) -> list[str]:
        """Processes of ours on this rank that publish node state, in start order."""
        return ["coordinator", "relay", "keeper", "engine", "prober", *self.agent_names]


CONFIG_FILE = "node.json"
LOG_DIR = "log"
SOCKET_DIR = "sock"
TEMPORARY_DIR = "tmp"
SUPERVISOR_SOCKET = "supervisor.sock"
SUPERVISOR_CONF = "supervisor.conf"
EVENTS_SOCKET = "sock/events"
"""Unix datagram socket of the coordinator, for the supervisord plugin's ProcessChange hints."""
INCARNATION_FILE = "incarnation"
LOG_LEVELS_FILE = "log-levels.json"
"""Levels that were changed while the node runs (shared/log_levels.py)."""
ADAPTERS_FILE = "adapters.json"
"""LoRA adapters by name with their source, which the next incarnation of the engine loads again."""
EPOCH_FILE = "epoch"
LEFT_BEHIND_EXIT = 75
"""The keeper's exit code (sysexits.h: EX_TEMPFAIL) when processes of an engine before can't be killed."""
DISCOVERY_DIR = "discovery"
REGISTRATIONS_DIR = "registrations"
LOCK_FILE = "lock"


def split_address(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``[IPV6]:PORT``, as --dist-init-addr has it. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536 or (":" in host and host[0] != "["):
        raise ValueError(f"expected HOST:PORT, got {text!r}")
    return host.strip("[]"), int(port)


def save(config: NodeConfig) -> None:
    """Write ``node.json``, readable by the node's user only, replaced atomically."""
    target = config.path / CONFIG_FILE
    temporary = target.with_suffix(".tmp")
    temporary.touch(mode=0o600)
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2))
    temporary.replace(target)


def load(runtime_dir: str | Path | None = None) -> NodeConfig:
    """Read ``node.json`` of the given runtime directory, or of the one in SGNODE_RUNTIME_DIR.

    Raises NodeError when there is none or it can't be read.
    """
    directory = runtime_dir or os.environ.get(RUNTIME_DIR_VARIABLE)
    if not directory:
        raise NodeError(f"{RUNTIME_DIR_VARIABLE} is not set: start this process through `sgnode serve`")
    path = Path(directory) / CONFIG_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=NodeConfig)
    except FileNotFoundError as error:
        raise NodeError(f"{path}: no such file; no node runs in this runtime directory") from error
    except (OSError, msgspec.MsgspecError) as error:
        raise NodeError(f"{path}: {error}") from error
