"""Engine controls: dynamo.sglang's own routes and adapter handling (1.6.1) without its runtime, one at a time.

What the incumbent does to discovery after a route is here a change of ``Serving``, which every agent follows.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from dynamo.common.model_taints import TOPOLOGY_TAINT_PREFIX
from dynamo.sglang.request_handlers.handler_base import BaseWorkerHandler

from shared.errors import Code, RequestError
from shared.frames import Serving

Route = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
PREFIX = "control/"
ALONGSIDE = ("control/is_scaling_elastic_ep",)
"""Routes that only look: they don't wait for one that works."""
TAINTS = "update/model_taints"
RELEASE, RESUME = "release_memory_occupation", "resume_memory_occupation"
ADAPTERS_FILE = "adapters.json"
"""In the runtime directory: adapters by name with their source, which the next incarnation loads again."""


class Routes(BaseWorkerHandler):  # type: ignore[misc]
    """Every control by its path under ``/engine/``; adapters; the cache's flush. ``changed`` hears what it serves now."""

    def __init__(self, engine: Any, config: Any, incarnation: int, runtime_dir: Path, changed: Callable[[Serving], None]) -> None:
        """Raises ValueError for an --engine-route that this engine has no method for."""
        super().__init__(engine, config)
        self._manager = engine.tokenizer_manager
        self._changed = changed
        self._file = runtime_dir / ADAPTERS_FILE
        self._sources: dict[str, str] = {}
        self._released: set[str] = set()
        self._pause_mode = ""
        self._one = asyncio.Lock()
        self.serving = Serving(incarnation)
        self.paths: dict[str, Route] = {}
        # register_engine_routes asks a Dynamo runtime for this one method.
        self.register_engine_routes(self)
        self.paths[TAINTS] = self._taints

    def register_engine_route(self, path: str, route: Route) -> None:
        self.paths[path] = route

    def generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        raise NotImplementedError("requests go through the backend")

    async def call(self, path: str, body: Any) -> dict[str, Any]:
        """Run the route of that path. Raises RequestError(UNKNOWN) for none, and whatever SGLang raises."""
        route = self.paths.get(path)
        if route is None:
            raise RequestError(Code.UNKNOWN, f"no engine route {path!r}")
        if path in ALONGSIDE:
            return await route(body)
        async with self._one:
            if path in (RELEASE, RESUME) and (answer := self._check_memory(path, body)) is not None:
                return answer
            # SGLang's answers come through a loop that the first request would start.
            self._manager.auto_create_handle_loop()
            try:
                answer = await route(body)
                if path == "pause_generation":
                    self._pause_mode = body.get("mode", "abort")
                elif path == RESUME:
                    self._released -= self._tags(body)
                return answer
            except BaseException:
                if path == RELEASE:
                    self._released -= self._tags(body)
                raise
            finally:
                self._say()

    def _check_memory(self, path: str, body: Any) -> dict[str, Any] | None:
        """What SGLang's scheduler would die of is refused (0.5.23: assertions in weight_updater.py); what is so already is ok.

        From here on no request gets in while memory is away. Raises ValueError.
        """
        tags = self._tags(body)
        if path == RESUME:
            if not self._released:
                return {"status": "ok"}
            if not tags <= self._released:
                raise ValueError(f"tags {sorted(tags - self._released)}: not released; released are {sorted(self._released)}")
            return None
        if tags <= self._released:
            return {"status": "ok"}
        # Paused by retraction or abort nothing is in a running batch; in place it is.
        if self._manager.rid_to_state and (not self._manager.is_pause or self._pause_mode == "in_place"):
            raise ValueError(f"{len(self._manager.rid_to_state)} requests are running; drain first, or use `sgnode sleep`")
        self._released |= tags
        return None

    def _tags(self, body: Any) -> set[str]:
        from sglang.srt.constants import GPU_MEMORY_ALL_TYPES

        found = body.get("tags") if isinstance(body, dict) else None
        if found is not None and (not isinstance(found, list) or not set(map(str, found)) <= set(GPU_MEMORY_ALL_TYPES)):
            raise ValueError(f"tags: expected a list of {', '.join(GPU_MEMORY_ALL_TYPES)}, got {found!r}")
        return set(found or GPU_MEMORY_ALL_TYPES)

    @property
    def asleep(self) -> bool:
        """Memory is away: a request would end SGLang's scheduler."""
        return bool(self._released)

    def _say(self) -> None:
        serving = self.serving
        paused = bool(getattr(self._manager, "is_pause", False)) or self.asleep
        adapters = dict(self.lora_id_for_name)
        self.serving = Serving(serving.incarnation, paused, self.asleep, adapters, serving.taints)
        self._changed(self.serving)

    async def _taints(self, body: Any) -> dict[str, Any]:
        """The route of dynamo.common.model_taints; the cards are the agents'."""
        if not isinstance(body, dict):
            raise ValueError("request body must be a JSON object")
        taints = body.get("taints")
        if not isinstance(taints, list) or not all(isinstance(taint, str) for taint in taints):
            raise ValueError("'taints' must be a JSON array of strings")
        if reserved := next((taint for taint in taints if taint.startswith(TOPOLOGY_TAINT_PREFIX)), None):
            raise ValueError(f"taint '{reserved}' uses reserved prefix '{TOPOLOGY_TAINT_PREFIX}'")
        self.serving.taints = sorted(set(taints))
        return {"status": "ok", "taints": self.serving.taints}

    # --- adapters and cache: answers as the incumbent's endpoints give them ------------------------------------------

    async def adapter(self, op: str, body: Any) -> dict[str, Any]:
        """``load_lora``, ``unload_lora``, ``list_loras``, ``clear_kv_blocks``: the one answer of that endpoint."""
        answer: dict[str, Any] = {}
        async with self._one:
            async for said in getattr(self, op)(body):
                answer = said
            if op in ("load_lora", "unload_lora"):
                self._keep(body)
                self._say()
        return answer

    def _keep(self, body: Any) -> None:
        """Write down which adapters there are: an engine that died must not forget them."""
        if isinstance(body, dict) and isinstance(body.get("source"), dict) and isinstance(body.get("lora_name"), str):
            self._sources.setdefault(body["lora_name"], str(body["source"].get("uri")))
        self._sources = {name: uri for name, uri in self._sources.items() if name in self.lora_id_for_name}
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._sources))
        temporary.replace(self._file)

    async def reload(self) -> None:
        """Load the adapters that an earlier incarnation had; one that fails is left out, and said."""
        if not self._file.exists():
            return
        for name, uri in json.loads(self._file.read_text()).items():
            answer = await self.adapter("load_lora", {"lora_name": name, "source": {"uri": uri}})
            if answer.get("status") != "success":
                logging.error("adapter %s is not there any more: %s", name, answer.get("message"))
