"""SGLang's vision tower alone (MMEncoder) behind the backend seam: media in, embeddings out for another worker's engine.

A request lasts until its embeddings were fetched: what ends it, from its client's leaving to its agent's death, withdraws them.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from procs.engine.adapter import embeddings, facts, pixels
from procs.engine.adapter.embedding_cache import Encoded, EncodedCache
from procs.engine.adapter.requests import Requests, one_end
from procs.engine.adapter.side_loop import SideLoop
from procs.engine.backend import Sink
from shared import logs
from shared.blobs import BLOBS
from shared.config import NodeConfig
from shared.errors import Code, RequestError
from shared.frames import EngineFacts

if TYPE_CHECKING:
    from procs.engine.adapter.decoded import Decoded

GIGABYTE = 1024**3
KINDS = ("image", "video")
"""What becomes embeddings, in the order in which they go along (dynamo.sglang 1.6.1)."""
ENDED = {"type": "stop"}


@dataclass
class Progress:
    """What the tower does, for a prober that knows SGLang's schedulers: a step is one image or video. Written on its loop."""

    steps: int = 0
    running: int = 0
    since: float = 0.0
    """When it began or ended one last."""

    def begin(self) -> None:
        if not self.running:
            self.since = time.monotonic()
        self.running += 1

    def end(self, *, given_up: bool = False) -> None:
        """``given_up``: it was cancelled, which says nothing of the tower."""
        self.running -= 1
        if not given_up:
            self.steps += 1
            self.since = time.monotonic()

    def numbers(self) -> dict[str, float]:
        return {
            "scheduler_steps_dp0": self.steps,
            "scheduler_busy_dp0": float(self.running > 0),
            "scheduler_step_seconds_dp0": time.monotonic() - self.since if self.running else 0.0,
            "running_dp0": self.running,
        }


class EncodeBackend:
    """See procs.engine.backend.Backend."""

    _decoded: "Decoded | None" = None
    """Reads what frontends have decoded, where the node is told that they do."""

    def __init__(self, config: NodeConfig, incarnation: int) -> None:
        """Build the tower; blocks for the whole load. Raises ValueError for a model without one."""
        from dynamo.sglang._compat import get_mm_encoder_class, publish_server_args
        from dynamo.sglang.args import parse_args

        started = time.monotonic()
        self._parsed = asyncio.run(parse_args(config.worker_argv))
        asyncio.set_event_loop(asyncio.new_event_loop())
        server_args = self._parsed.server_args
        logs.take_back()  # dynamo.sglang has its own configuration, from its import on
        publish_server_args(server_args, role="encoder")
        self._encoder = get_mm_encoder_class()(server_args=server_args, dist_init_method="tcp://127.0.0.1:0", rank=0)
        server_args = self._parsed.use_resolved_server_args(self._encoder.server_args)
        self._placeholders = placeholders(self._encoder.model_config, server_args)
        if not self._placeholders:
            raise ValueError(f"{server_args.model_path}: this model has no placeholder for images or videos")
        self._tower = SideLoop("sgnode-encode")
        self._mode = self._parsed.dynamo_args.embedding_transfer_mode.value
        capacity = int((self._parsed.dynamo_args.multimodal_embedding_cache_capacity_gb or 0) * GIGABYTE)
        self._cache = EncodedCache(capacity, self._encode)
        self._progress = Progress()
        self._turns = pixels.Turns()
        self._requests = Requests()
        self._sink: Sink | None = None
        self._limits = config.media
        self.info: dict[str, str] = {}
        self.facts = _facts(config, self._encoder, server_args, sorted(self._placeholders), time.monotonic() - started)

    def start(self, sink: Sink, stop: Callable[[], None]) -> None:
        self._sink = sink
        self._box = embeddings.outbox(self._mode)
        if self._limits.frontend_decoding:
            from procs.engine.adapter.decoded import Decoded

            self._decoded = Decoded(self._limits)

    async def warm(self) -> None:
        """The first canary does it."""

    def submit(self, rid: str, payload: dict[str, Any]) -> None:
        self._requests.begin(rid, self._run(rid, payload))

    def abort(self, rid: str) -> None:
        self._requests.soon(rid, self._requests.cancel)

    async def _run(self, rid: str, payload: dict[str, Any]) -> None:
        """One request, with exactly one end whatever happens."""
        sink = self._sink
        assert sink is not None
        with one_end(rid, sink):
            await self._serve(rid, payload, sink)
            sink.output(rid, [], dict(ENDED), None)

    async def _serve(self, rid: str, payload: dict[str, Any], sink: Sink) -> None:
        import torch

        kinds, contents = payload.get("media") or [], payload.pop(BLOBS, [])
        ids = payload["input_ids"]
        keeps = payload.get("keep", False)
        if not keeps:
            check(ids, kinds, self._placeholders)
        if self._decoded is not None:
            await self._decoded.settle(contents, payload.get("decoded", []), files=True)
        order = [index for kind in KINDS for index, found in enumerate(kinds) if found == kind]
        # A canary asks whether the tower works, which the cache doesn't know.
        find = self._encode if keeps else self._cache.get
        made = await together([find(kinds[index], contents[index]) for index in order])
        del contents
        if keeps:
            return
        kinds = [kinds[index] for index in order]
        whole = torch.cat([one.embeddings for one in made])  # a copy, also of one: the cache keeps its own
        async with embeddings.offered(self._box, whole) as (transfer, taken):
            said = {
                "multimodal_inputs": [_item(kind, one) for kind, one in zip(kinds, made, strict=True)],
                "embeddings_shape": list(whole.shape),
                "transfer_payload": transfer,
            }
            del whole
            expanded = expand(ids, [(self._placeholders[kind], one.rows) for kind, one in zip(kinds, made, strict=True)])
            sink.output(rid, [], None, {"encoded": said, "input_ids": expanded})
            await taken()

    async def _encode(self, kind: str, content: bytes) -> Encoded:
        """One image or video through the tower. Raises RequestError."""
        size = await asyncio.to_thread(pixels.count, content) if kind == "image" else 0
        async with self._turns.share(size):
            return await self._tower.call(self._step(kind, content))

    async def _step(self, kind: str, content: bytes) -> Encoded:
        """On the tower's loop: there a request that was cancelled has not ended before the tower lets go of it."""
        self._progress.begin()
        given_up = False
        try:
            return await encode(self._encoder, kind, content)
        except asyncio.CancelledError:
            given_up = True
            raise
        finally:
            self._progress.end(given_up=given_up)

    async def control(self, op: str, args: dict[str, Any]) -> Any:
        if op == "route":
            raise RequestError(Code.UNKNOWN, f"an encode worker has no engine route {args.get('path')!r}")
        raise ValueError(f"unknown control {op!r}")

    def numbers(self) -> dict[str, float]:
        return {**self._progress.numbers(), **self._cache.numbers(), **facts.transfers()}

    def close(self) -> None:
        self._tower.close()


async def together(items: Sequence[Coroutine[Any, Any, Encoded]]) -> list[Encoded]:
    """One request's. The first that fails ends the others, which nobody would take."""
    tasks = [asyncio.ensure_future(item) for item in items]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def encode(encoder: Any, kind: str, content: bytes) -> Encoded:
    """SGLang's answer for one image or video. Raises RequestError."""
    from dynamo.sglang._compat import mm_encode
    from sglang.srt.managers.schedule_batch import Modality

    try:
        grids, made, aux = await mm_encode(encoder, [bytes(content)], Modality[kind.upper()])
    except Exception as error:
        # SGLang's own (0.5.23, encoder/server.py): what it says of a client's file has a status, and much of the file in it.
        if 400 <= int(getattr(error, "code", None) or 500) < 500:
            raise RequestError(Code.INVALID, f"{kind}: can't be decoded: damaged, or too small for the model") from None
        raise
    grid = grids.tolist() if hasattr(grids, "tolist") else grids
    grid = grid[0] if isinstance(grid[0], list) else grid
    if made.ndim != 2 or len(grid) != 3:
        raise RequestError(Code.INTERNAL, f"{kind}: the encoder gave embeddings of the shape {list(made.shape)}, grid {grid}")
    # Its rows may be a view of a batch's.
    return Encoded(made.detach().cpu().clone(), [int(size) for size in grid], _first(aux, "second_per_grid_ts"), _times(aux))


def _first(aux: dict[str, Any] | None, name: str) -> Any:
    """Of one item, plain."""
    value: Any = (aux or {}).get(name)
    value = value.tolist() if hasattr(value, "tolist") else value
    return value[0] if isinstance(value, list) and value else value


def _times(aux: dict[str, Any] | None) -> list[float] | None:
    value = _first(aux, "video_timestamps")
    value = value.tolist() if hasattr(value, "tolist") else value
    return value if value is None or isinstance(value, list) else [value]


def _item(kind: str, made: Encoded) -> dict[str, Any]:
    """As dynamo.sglang's workers read it (MultiModalGroup)."""
    item: dict[str, Any] = {f"{kind}_grid_thw": made.grid, "num_mm_tokens": made.rows}
    if kind == "video":
        item.update(second_per_grid_ts=made.second_per_grid_ts, video_timestamps=made.video_timestamps)
    return item


def check(ids: list[int], kinds: list[str], known: dict[str, int]) -> None:
    """One placeholder an item, no more and no fewer. Raises RequestError(INVALID)."""
    for kind in {*kinds, *known}:
        if kind not in known:
            raise RequestError(Code.INVALID, f"this model takes no {kind}")
        there, given = ids.count(known[kind]), kinds.count(kind)
        if there != given:
            raise RequestError(Code.INVALID, f"the prompt has {there} placeholders of type {kind} for {given} of them")


def expand(ids: list[int], items: list[tuple[int, int]]) -> list[int]:
    """The prompt with as many placeholders an item as it has rows. ``items``: placeholder and rows, of each kind in order."""
    rows: dict[int, list[int]] = {}
    for token, count in items:
        rows.setdefault(token, []).append(count)
    expanded: list[int] = []
    for token in ids:
        left = rows.get(token)
        expanded += [token] * (left.pop(0) if left else 1)
    return expanded


def placeholders(model_config: Any, server_args: Any) -> dict[str, int]:
    """Token ids by kind: of the model's configuration, of its processor, or of --chat-template (all that dynamo.sglang knows)."""
    config = getattr(model_config.hf_config, "thinker_config", None) or model_config.hf_config
    found = {}
    for kind in KINDS:
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            if isinstance(token := getattr(config, name, None), int):
                found[kind] = token
                break
    if "image" not in found:
        from sglang.srt.parser.conversation import chat_templates
        from transformers import AutoProcessor

        trust = server_args.trust_remote_code
        processor = AutoProcessor.from_pretrained(server_args.model_path, trust_remote_code=trust)
        tokenizer = getattr(processor, "tokenizer", processor)
        template = chat_templates.get(server_args.chat_template)
        for word in (getattr(processor, "image_token", None), template and template.image_token):
            token = tokenizer.convert_tokens_to_ids(word) if word else None
            if isinstance(token, int) and token != tokenizer.unk_token_id:
                found["image"] = token
                break
    return found


def _facts(config: NodeConfig, encoder: Any, server_args: Any, media: list[str], load_seconds: float) -> EngineFacts:
    import sglang
    from dynamo.sglang.capacity import kv_event_block_size

    model = encoder.model_config
    return EngineFacts(
        role=config.role,
        engine="sglang",
        version=sglang.__version__,
        model_path=str(server_args.model_path),
        served_model_name=server_args.served_model_name,
        vocab_size=int(model.vocab_size),
        context_length=int(model.context_len),
        block_size=kv_event_block_size(server_args),
        total_kv_blocks=None,
        max_running_requests=None,
        max_num_batched_tokens=None,
        dp_start=0,
        dp_size=1,
        bos_token_id=None,
        eos_token_ids=[],
        load_seconds=load_seconds,
        media=media,
    )
