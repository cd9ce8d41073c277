"""Image and video generation behind the backend seam: a queue, one generation at a time, and its scheduler's death."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn

from procs.engine.adapter.diffusion import generator
from procs.engine.adapter.diffusion.generator import GenerationError, Made
from procs.engine.adapter.diffusion.progress import Progress
from procs.engine.adapter.requests import ABORTED
from procs.engine.backend import Sink
from shared import log_levels, logs
from shared.blobs import BLOBS
from shared.config import NodeConfig
from shared.errors import Code, RequestError
from shared.frames import EngineFacts

QUEUE = 64
"""Requests that may wait for their turn: SGLang makes one at a time (0.5.23, batching_max_size 1)."""
DEAD_EXIT = 70
"""Exit code after a process of SGLang's scheduler has ended: ``generate`` would wait for it for ever."""
OTHER_KIND_EXIT = 2
"""Exit code for a model that makes something else than the role: bad input, where `sgnode serve` could not know."""
ABANDONED_SECONDS = 5.0
"""At a stop, for a scheduler's process that was killed in mid-generation to be gone."""


class DiffusionBackend:
    """``DiffGenerator`` behind the backend seam (procs.engine.backend.Backend)."""

    def __init__(self, config: NodeConfig, incarnation: int, build: Callable[[dict[str, Any]], Any] = generator.build) -> None:
        """Blocks for the whole load. Ends the process for a model that makes something else than the role."""
        from dynamo.sglang.args import _diffusion_generator_kwargs, parse_args

        started = time.monotonic()
        parsed = asyncio.run(parse_args(config.worker_argv))
        asyncio.set_event_loop(asyncio.new_event_loop())
        arguments = _diffusion_generator_kwargs(parsed.server_args)
        if (level := parsed.server_args.log_level) != "info":
            os.environ[log_levels.OURS] = level
            arguments["log_level"] = level
        logs.take_back()  # dynamo.sglang has its own configuration, from its import on
        self._generator = build(arguments)
        logs.take_back()  # and so has SGLang's diffusion
        if generator.makes_videos(self._generator) != (config.role == "video"):
            made = "videos: --video-generation-worker" if config.role == "image" else "pictures: --image-diffusion-worker"
            # An exception would have SGLang kill its scheduler first, and that would be the reason the keeper gives.
            _leave(OTHER_KIND_EXIT, f"{config.model_path} makes {made}")
        self.facts = _facts(config, self._generator, time.monotonic() - started)
        self.info: dict[str, str] = {}
        self._progress = Progress()
        self._most = config.media.memory_bytes
        self._thread = ThreadPoolExecutor(1, "generate")
        self._waiting: dict[str, dict[str, Any]] = {}
        self._running = ""
        """The request that SGLang is at; empty: none."""
        self._dropped = False
        """Nobody waits for it any more. It can't be stopped: there is no such call in SGLang 0.5.23."""
        self._handed = self._generations = 0
        self._seconds = 0.0
        self._sink: Sink | None = None

    def start(self, sink: Sink, stop: Callable[[], None]) -> None:
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self._progress.listen(self._generator.server_args)
        for process in self._generator.local_scheduler_process or ():
            # The keeper sees it as well; whoever is first.
            self._loop.add_reader(process.sentinel, self._died, process)

    async def warm(self) -> None:
        """The prober's first canary is the warm-up."""

    # --- requests ----------------------------------------------------------------------------------------------------

    def submit(self, rid: str, payload: dict[str, Any]) -> None:
        if not payload.get("canary") and (problem := self._full(payload)):
            assert self._sink is not None
            self._sink.failed(rid, Code.OVERLOADED, problem)
            return
        self._waiting[rid] = payload
        self._next()

    def _full(self, payload: dict[str, Any]) -> str:
        """Why one more can't wait; empty when it can."""
        if len(self._waiting) >= QUEUE:
            return f"{len(self._waiting)} generations wait for this engine, {QUEUE} at most"
        held = sum(map(_size, self._waiting.values()))
        # An agent lets through no single one that is larger.
        if held + _size(payload) > self._most:
            return f"media of {held >> 20} MB wait for this engine, {self._most >> 20} MB at most (--media-memory-mb)"
        return ""

    def abort(self, rid: str) -> None:
        """In the loop's next turn, whoever asks may be going through its requests."""
        self._loop.call_soon(self._abort, rid)

    def _abort(self, rid: str) -> None:
        assert self._sink is not None
        if self._waiting.pop(rid, None) is None:
            if rid != self._running or self._dropped:
                return
            self._dropped = True
        self._sink.output(rid, [], dict(ABORTED), None)

    def _next(self) -> None:
        if self._running or not self._waiting:
            return
        # Canaries first: a prober that has just started has one deadline, whatever waits here.
        self._running = rid = min(self._waiting, key=lambda rid: not self._waiting[rid].get("canary"))
        payload = self._waiting.pop(rid)
        self._dropped = False
        self._progress.step()
        making = self._loop.run_in_executor(self._thread, generator.make, self._generator, rid, payload, self._progress.step)
        making.add_done_callback(partial(self._made, rid, time.monotonic()))

    def _made(self, rid: str, began: float, making: "asyncio.Future[Made]") -> None:
        sink = self._sink
        assert sink is not None
        self._running = ""
        self._progress.step()
        self._generations += 1
        self._seconds += time.monotonic() - began
        if making.cancelled():
            return
        error = making.exception()
        if self._dropped:
            logging.info("request %s: made for nobody, dropped", rid)
        elif error is None:
            made = making.result()
            self._handed += 1
            sink.output(rid, [], {"type": "stop"}, {BLOBS: [made.content], "frames": made.frames})
        elif isinstance(error, RequestError):
            sink.failed(rid, error.code, error.message)
        else:
            message = str(error) if isinstance(error, GenerationError) else f"{type(error).__name__}: {error}"
            logging.error("request %s: %s", rid, message, exc_info=None if isinstance(error, GenerationError) else error)
            sink.output(rid, [], {"type": "abort", "status_code": 500, "message": message}, None)
        self._next()

    def _died(self, process: Any) -> None:
        _leave(DEAD_EXIT, f"{process.name} (pid {process.pid}) has ended: leaving at once, the keeper frees everything")

    # --- the rest ----------------------------------------------------------------------------------------------------

    async def control(self, op: str, args: dict[str, Any]) -> Any:
        """Raises RequestError(UNKNOWN), ValueError: it has no controls, as dynamo.sglang's image and video workers."""
        if op == "route":
            raise RequestError(Code.UNKNOWN, f"no engine route {args['path']!r}")
        raise ValueError(f"unknown control {op!r}")

    def numbers(self) -> dict[str, float]:
        """As SGLang's schedulers (procs.engine.adapter.scheduler): a step is whatever shows that a generation goes on."""
        running, waiting = float(bool(self._running)), float(len(self._waiting))
        self._progress.look(each.pid for each in self._generator.local_scheduler_process or () if running)
        return {
            "scheduler_steps_dp0": self._progress.steps,
            "scheduler_outputs_dp0": self._handed,
            "scheduler_busy_dp0": float(bool(running or waiting)),
            "scheduler_step_seconds_dp0": time.monotonic() - self._progress.at if running else 0.0,
            "running_dp0": running,
            "waiting_dp0": waiting,
            "generations_total": self._generations,
            "generation_seconds_total": self._seconds,
        }

    def close(self) -> None:
        """An idle generator is shut down in order; one in mid-generation would take no notice for as long as that lasts."""
        processes = self._generator.local_scheduler_process or ()
        for process in processes:
            with contextlib.suppress(ValueError, RuntimeError):
                self._loop.remove_reader(process.sentinel)
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._progress.close()
        if not self._running:
            self._generator.shutdown()
            return
        for process in processes:
            process.kill()
        for process in processes:
            process.join(ABANDONED_SECONDS)


def _size(payload: dict[str, Any]) -> int:
    """Bytes of the media that came with it."""
    return sum(map(len, payload.get(BLOBS) or ()))


def _leave(code: int, why: str) -> NoReturn:
    """No destructor runs: the keeper ends what is left."""
    logging.critical("%s", why)
    logging.shutdown()
    os._exit(code)


def _facts(config: NodeConfig, made: Any, load_seconds: float) -> EngineFacts:
    """No tokens, no KV cache: those sizes are 0 or None, and not on the model card."""
    import sglang

    return EngineFacts(
        role=config.role,
        engine="sglang",
        version=sglang.__version__,
        model_path=config.model_path,
        served_model_name=config.served_model_name,
        vocab_size=0,
        context_length=0,
        block_size=0,
        total_kv_blocks=None,
        max_running_requests=None,
        max_num_batched_tokens=None,
        dp_start=0,
        dp_size=1,
        bos_token_id=None,
        eos_token_ids=[],
        load_seconds=load_seconds,
        media=["image"] if generator.takes_images(made) else [],
        max_pixels=config.media.max_pixels,
    )
