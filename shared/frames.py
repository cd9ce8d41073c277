"""Wire structs between the node's processes and nothing else.

Encoding is msgpack (msgspec), every struct an array with its tag first. One tagged union a socket. Fields are only
ever appended, with defaults, so that version N and N-1 talk: ``PROTOCOL`` travels in the first exchange.
"""

from typing import Any

import msgspec

PROTOCOL = 1
"""Version of the request path. A peer with PROTOCOL or PROTOCOL - 1 is served, any other is refused in one line."""

RID_LENGTH = 32
"""Request ids are 32 hex characters: SGLang 0.5.23 aborts by prefix, so no id may be a prefix of another."""


class Frame(msgspec.Struct, tag=True, array_like=True, gc=False):
    """Base of every frame. ``gc=False``: frames hold no cycles, and the token path makes many."""


# --- request path: agent or prober (DEALER) -> engine (ROUTER) -------------------------------------------------------


class Hello(Frame, tag="Hello"):
    """First frame of a peer. ``name`` is the process ("agent:0"), ``life`` is unique to this life of it.

    A Hello aborts whatever an earlier life of the same name left running.
    """

    protocol: int
    name: str
    life: str


class Submit(Frame, tag="Submit"):
    """One request. ``payload`` is what the role's ``to_engine`` made: keyword arguments of the engine, plain data.

    ``incarnation`` is the engine life that the peer was welcomed by; a stale Submit fails with ``stale``.
    """

    incarnation: int
    rid: str
    payload: dict[str, Any]
    context: str = ""
    """The frontend's id of the request, for the log."""
    blobs: int = 0
    """How many parts of the message follow this one: ``payload["blobs"]``, media as they are (shared.blobs)."""


class Abort(Frame, tag="Abort"):
    """End a request. Answered by its terminal output (finish reason ``abort``); unknown ids are ignored."""

    rid: str


class Control(Frame, tag="Control"):
    """An engine control outside the token path, answered by one ControlDone with the same ``id``."""

    id: int
    op: str
    args: dict[str, Any]


class Credit(Frame, tag="Credit"):
    """``steps``: how many Step frames of this connection the peer has taken, counted from its Hello."""

    steps: int


ToEngine = Hello | Submit | Abort | Control | Credit


# --- request path: engine (ROUTER) -> agent or prober (DEALER) -------------------------------------------------------


class EngineFacts(Frame, tag="EngineFacts"):
    """What an engine is, once it is up. Sizes: ``block_size`` in tokens, ``total_kv_blocks`` per DP rank."""

    role: str
    engine: str
    version: str
    model_path: str
    served_model_name: str
    vocab_size: int
    context_length: int
    block_size: int
    total_kv_blocks: int | None
    max_running_requests: int | None
    max_num_batched_tokens: int | None
    dp_start: int
    dp_size: int
    bos_token_id: int | None
    eos_token_ids: list[int]
    load_seconds: float
    runtime_config: dict[str, Any] = {}
    """Further attributes of Dynamo's ModelRuntimeConfig (parsers, flags), by name."""
    runtime_data: dict[str, str] = {}
    """Engine-specific entries of the model card: name -> JSON text (ModelRuntimeConfig.set_engine_specific)."""
    metrics_dir: str | None = None
    """PROMETHEUS_MULTIPROC_DIR of this incarnation, when the engine writes metrics."""
    bootstrap_host: str | None = None
    """Where other engines of a disaggregated deployment reach this one, with ``bootstrap_port``."""
    bootstrap_port: int | None = None
    fake_bootstrap_host: str | None = None
    """SGLang's name for a transfer that is skipped; for canaries of prefill and decode."""
    skip_tokenizer_init: bool = False
    traces: bool = False
    """The engine wants trace headers."""
    uploads: bool = False
    """Metadata goes to the client's own store when a request says so (--enable-rl)."""
    max_loras: int | None = None
    """Adapters that a batch may use; None when the engine serves none."""
    media: list[str] = []
    """Kinds of media that the model takes: ``image``, ``video``, ``audio``."""
    max_pixels: int | None = None
    """Of one picture that is generated (--media-max-megapixels); None: it generates none."""


class Welcome(Frame, tag="Welcome"):
    """Answer to Hello. ``window``: the engine keeps at most so many Step frames on their way to this peer."""

    protocol: int
    incarnation: int
    epoch: int
    window: int
    facts: EngineFacts


class Refused(Frame, tag="Refused"):
    """Answer to a Hello that can't be served; ``reason`` is one line for the log. The peer gives up and says so."""

    reason: str


class Output(Frame, tag="Output"):
    """New tokens of one request. ``offset``: how many tokens of it were sent before; a gap is the peer's to refuse.

    ``finish`` is None until the last output: then ``{"type": "stop"|"length"|"abort", ...}`` as SGLang says it.
    ``meta`` carries what the role's ``from_engine`` asks for: prompt_tokens, cached_tokens, log probabilities.
    """

    rid: str
    offset: int
    token_ids: list[int]
    finish: dict[str, Any] | None = None
    meta: dict[str, Any] | None = None
    text: str | None = None
    """New text, in text mode only."""
    blobs: int = 0
    """How many of the message's further parts are this output's ``meta["blobs"]``, in the order of the step's outputs."""


class Step(Frame, tag="Step"):
    """All of one peer's new tokens of one engine step, in one frame. ``seq`` counts from 1 for each connection."""

    incarnation: int
    seq: int
    outputs: list[Output]


class Failed(Frame, tag="Failed"):
    """A request ended without a terminal output. ``code`` is one of shared.errors.Code; ``message`` one line."""

    rid: str
    code: str
    message: str


class ControlDone(Frame, tag="ControlDone"):
    """Answer to Control. ``result`` is plain data; ``error`` is None when it worked."""

    id: int
    error: str | None
    result: Any = None
    code: str = ""
    """One of shared.errors.Code, with an error."""


FromEngine = Welcome | Refused | Step | Failed | ControlDone


# --- node state: each process PUB, whoever is interested SUB ---------------------------------------------------------


class Beat(Frame, tag="Beat"):
    """A process's state, twice a second and at each change. Times are UNIX seconds. See shared.state for the states.

    ``waiting_for``: what has to happen before the state can change, for an operator's eyes.
    ``numbers``: counters and gauges of this process by name (inflight, steps, tokens, ...).
    """

    process: str
    pid: int
    state: str
    detail: str
    since: float
    waiting_for: str
    incarnation: int
    epoch: int
    numbers: dict[str, float] = {}
    info: dict[str, str] = {}
    marks: dict[str, float] = {}
    """When what had happened in a start-up, by name (procs/coordinator/startup.py)."""


class Death(Frame, tag="Death"):
    """The engine of ``incarnation`` is dead or dying: ``who`` died first (engine, scheduler, ...), and why.

    From the keeper; from the coordinator when the keeper itself was killed.
    """

    incarnation: int
    who: str
    pid: int
    reason: str
    at: float


class KvUse(Frame, tag="KvUse"):
    """KV use of one DP rank, in tokens and blocks, from SGLang's KvMetrics."""

    incarnation: int
    dp_rank: int
    used_blocks: int
    total_blocks: int
    waiting: int
    usage: float
    prefix_hit_rate: float


class Serving(Frame, tag="Serving"):
    """What an engine serves beside its base model, twice a second and at each change; agents make discovery follow.

    ``paused``: generation is paused, nothing is to be routed here. ``asleep``: its memory is released as well. ``adapters``: LoRA
    adapters by name, with Dynamo's id. ``taints``: routing taints of the model card; None: as the card has them.
    """

    incarnation: int
    paused: bool = False
    asleep: bool = False
    adapters: dict[str, int] = {}
    taints: list[str] | None = None


class Verdict(Frame, tag="Verdict"):
    """The prober's word on an incarnation: healthy or not, and why. Repeated twice a second."""

    incarnation: int
    healthy: bool
    reason: str


class Intent(Frame, tag="Intent"):
    """What is wanted of the node: ``serve``, ``drain`` or ``stop``. Repeated twice a second.

    ``hurry``: a drain or stop that waits for nothing: running streams end now with the migratable error.
    """

    want: str
    since: float
    reason: str
    hurry: bool = False


EngineState = Beat | KvUse | Serving
KeeperState = Beat | Death
RelayState = Beat | KvUse
ProberState = Beat | Verdict
CoordinatorState = Beat | Death | Intent
AgentState = Beat
AnyState = Beat | Death | KvUse | Serving | Verdict | Intent


# --- the group: a follower's coordinator (DEALER) -> the leader's (ROUTER) and back, over TCP --------------------------


class Member(Frame, tag="Member"):
    """All that a follower has to say, twice a second and at each change: one that is lost is made good by the next.

    ``life``: of this coordinator; ``node``: of its node, the same in each life of the coordinator; ``number`` counts from 1 in a
    life. ``leader`` and ``heard``: life and number of the newest Epoch frame that it took. ``group`` and ``epoch``: the one that
    its engine was last started for. ``engine``: ``none`` (no process is left), ``up``, ``ready``, ``dead`` (being cleared away);
    ``reason``: why it is gone. ``want`` as in Intent. ``clock``: UNIX seconds. ``facts``: what must be alike on every rank.
    ``pause``: seconds of silence that mean nothing: this coordinator is being restarted.
    """

    protocol: int
    node_rank: int
    life: str
    node: str
    host: str
    number: int
    leader: str
    heard: int
    group: str
    epoch: int
    engine: str
    reason: str
    want: str
    clock: float
    facts: dict[str, str]
    pause: float = 0.0


class Epoch(Frame, tag="Epoch"):
    """All that the leader has to say, twice a second and at each change. ``life``, ``number`` as in Member.

    ``group`` is made at the leader node's start, ``epoch`` counts its epochs; ``open``: engines of it shall run. ``orderly``: it
    was ended on purpose, nothing has failed. ``reason``: why it is over. ``waiting_for``: what the next one waits for. ``state``
    and ``progress`` are the leader node's, for an operator's eyes; ``workers``: worker ids of its agents. ``pause`` as in Member.
    """

    protocol: int
    life: str
    number: int
    group: str
    epoch: int
    open: bool
    orderly: bool
    reason: str
    waiting_for: str
    state: str
    progress: str
    workers: list[str] = []
    pause: float = 0.0


ToLeader = Member
FromLeader = Epoch | Refused


# --- metrics: prober (DEALER) -> relay (ROUTER) and back -------------------------------------------------------------


class Scrape(Frame, tag="Scrape"):
    """Ask for the node's metrics."""

    id: int


class MetricsText(Frame, tag="MetricsText"):
    """The node's metrics in Prometheus text format."""

    id: int
    text: str


# --- supervisord plugin -> coordinator (a unix datagram; a hint, the truth is asked by RPC) --------------------------


class ProcessChange(Frame, tag="ProcessChange"):
    """supervisord moved a process to another state."""

    process: str
    state: str
    pid: int
