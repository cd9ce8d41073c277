"""Engine controls: dynamo.sglang's own routes and adapter handling (1.6.1) without its runtime, one at a time.

What the incumbent does to discovery after a route is here a change of ``Serving``, which every agent follows.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from dynamo.common.model_taints import TOPOLOGY_TAINT_PREFIX
from dynamo.sglang.request_handlers.handler_base import BaseWorkerHandler

from procs.engine.adapter.guard import PAUSE, RELEASE, RESUME, Memory, check_body
from shared import files
from shared.config import ADAPTERS_FILE
from shared.errors import Code, RequestError
from shared.frames import Serving

Route = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
PREFIX = "control/"
ALONGSIDE = ("control/is_scaling_elastic_ep",)
"""Routes that only look: they don't wait for one that works."""
TAINTS = "update/model_taints"


class Routes(BaseWorkerHandler):  # type: ignore[misc]
    """Every control by its path under ``/engine/``; adapters; the cache's flush. ``changed`` hears what it serves now."""

    def __init__(self, engine: Any, config: Any, incarnation: int, runtime_dir: Path, changed: Callable[[Serving], None]) -> None:
        """Raises ValueError for an --engine-route that this engine has no method for."""
        super().__init__(engine, config)
        self._manager = engine.tokenizer_manager
        self._changed = changed
        self._file = runtime_dir / ADAPTERS_FILE
        self._sources: dict[str, str] = {}
        self._memory = Memory()
        self._in_place = False
        self._one = asyncio.Lock()
        self._weights = asyncio.Lock()
        """Of the control/* routes: a weights update waits for running requests, and a pause must not wait for it."""
        self.serving = Serving(incarnation)
        aliases = getattr(config.dynamo_args, "served_model_aliases", None) or ()
        self._taken = {config.server_args.served_model_name, *aliases}
        """Names of the base model: an adapter can't have one of them."""
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
        check_body(path, body)
        if path == RESUME and isinstance(body, dict) and not body.get("tags") and self._memory.released:
            body = {**body, "tags": sorted(self._memory.released)}  # SGLang would take "all" to the letter
        async with contextlib.AsyncExitStack() as locks:
            if not path.startswith(PREFIX):
                await locks.enter_async_context(self._one)
            if path.startswith(PREFIX) or path in (RELEASE, RESUME):
                await locks.enter_async_context(self._weights)
            if path in (RELEASE, RESUME) and (answer := self._memory.begin(path, body, running=self._running())) is not None:
                return answer
            # SGLang's answers come through a loop that the first request would start.
            self._manager.auto_create_handle_loop()
            try:
                answer = await route(body)
                if path == PAUSE:
                    self._in_place = body.get("mode") == "in_place"
                elif path in (RELEASE, RESUME):
                    self._memory.done(path, body)
                return answer
            finally:
                if path == RELEASE:
                    self._memory.undo()  # of one that has failed
                self._say()

    def _running(self) -> int:
        """Requests in a running batch: paused by retraction or abort none is, in place they are."""
        paused = self._manager.is_pause and not self._in_place
        return 0 if paused else len(self._manager.rid_to_state)

    @property
    def asleep(self) -> bool:
        """Memory is away: a request would end SGLang's scheduler."""
        return bool(self._memory.released)

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
        name = body.get("lora_name") if isinstance(body, dict) else None
        if op == "load_lora" and name in self._taken:
            what = (
                f"Failed to register LoRA '{name}' in discovery registry: a different model '{name}' is already registered there"
            )
            return {"status": "error", "message": what, "lora_name": name}
        async with self._one:
            async for said in getattr(self, op)(body):
                answer = said
            if op in ("load_lora", "unload_lora"):
                self._keep(body)
                self._say()
        return answer

    def _keep(self, body: Any) -> None:
        """Write down which adapters there are: an engine that died must not forget them."""
        if isinstance(body, dict) and isinstance(name := body.get("lora_name"), str):
            if name not in self.lora_id_for_name:
                self._sources.pop(name, None)
            elif isinstance(source := body.get("source"), dict):
                self._sources.setdefault(name, str(source.get("uri")))
        self._write()

    def _write(self) -> None:
        try:
            files.rewrite(self._file, json.dumps(self._sources).encode())
        except OSError as error:  # they serve now all the same
            logging.error("%s: the engine's next life will not have these adapters: %s", error.strerror, list(self._sources))

    async def reload(self) -> None:
        """Load the adapters that an earlier incarnation had; one that fails is left out, and said."""
        if not self._file.exists():
            return
        before = json.loads(self._file.read_text())
        self._sources.update(before)  # an engine that dies while it loads them has the rest still to do
        for name, uri in before.items():
            answer = await self.adapter("load_lora", {"lora_name": name, "source": {"uri": uri}})
            if answer.get("status") != "success":
                logging.error("adapter %s is not there any more: %s", name, answer.get("message"))
