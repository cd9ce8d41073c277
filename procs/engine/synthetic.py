"""A backend of dialled rate and faults, for process-tree tests and ceilings. It never stands in for SGLang in a claim.

Tokens are a function of the first prompt token and the position, so a lost, doubled or reordered one shows, and a
stream that migrates to another synthetic engine goes on where it stopped.

Faults at run time: POST /engine/fault {"kind": KIND, "seconds": N}. ``prefill``: steps without a token; ``step``: one step that
takes so long; ``deadlock``: no step any more, alive; ``lost``: tokens are made and never handed on; ``loop``: the event loop is
blocked; ``update``: a control that takes so long while nothing steps.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from procs.engine.backend import Sink
from shared.config import NodeConfig
from shared.errors import Code, RequestError
from shared.frames import EngineFacts, KvUse, Serving

CHILD = """
import ctypes, setproctitle, signal, sys
ctypes.CDLL(None).prctl(1, 9)
setproctitle.setproctitle(sys.argv[1])
signal.pause()
"""
"""Stands where SGLang has its scheduler and detokenizer: dies with its parent, named so that a keeper knows it."""
BLOCK_SIZE = 16
FAULTS = ("prefill", "step", "deadlock", "lost", "loop", "update")


def token_at(first: int, position: int, vocab_size: int) -> int:
    """The token at a position (prompt included) of the stream whose first prompt token is ``first``."""
    return (first * 7 + position * 31 + 11) % vocab_size


@dataclass
class _Request:
    first: int
    position: int
    left: int
    prompt: int
    done: int = 0
    aborted: bool = False


class SyntheticBackend:
    """See procs.engine.backend.Backend. Dials: shared.config.Synthetic."""

    def __init__(self, config: NodeConfig, incarnation: int) -> None:
        assert config.synthetic is not None
        self._dials = config.synthetic
        self._incarnation = incarnation
        started = time.monotonic()
        self._children = [
            subprocess.Popen([sys.executable, "-c", CHILD, f"sgnode::child{i}"]) for i in range(self._dials.children)
        ]
        time.sleep(self._dials.load_seconds)  # what loading weights is: nothing to wait for but time
        if self._dials.fault == "load":
            raise RuntimeError("synthetic fault: load")
        self._requests: dict[str, _Request] = {}
        self._sink: Sink | None = None
        self._serving = Serving(incarnation)
        self.info: dict[str, str] = {}
        self._fault, self._fault_until = "", 0.0
        self._steps = self._outputs = 0
        self._step_at: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self.facts = EngineFacts(
            role=config.role,
            engine="synthetic",
            version="0",
            model_path=config.model_path,
            served_model_name=config.served_model_name,
            vocab_size=self._dials.vocab_size,
            context_length=self._dials.context_length,
            block_size=BLOCK_SIZE,
            total_kv_blocks=self._dials.total_kv_blocks,
            max_running_requests=self._dials.max_running_requests,
            max_num_batched_tokens=8192,
            dp_start=0,
            dp_size=1,
            bos_token_id=1,
            eos_token_ids=[2],
            load_seconds=time.monotonic() - started,
        )

    def start(self, sink: Sink, stop: Callable[[], None]) -> None:
        self._sink = sink
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def warm(self) -> None:
        """Nothing to compile."""

    def submit(self, rid: str, payload: dict[str, Any]) -> None:
        assert self._sink is not None
        ids = payload.get("input_ids")
        params = payload.get("sampling_params") or {}
        if not isinstance(ids, list) or not ids:
            self._sink.failed(rid, Code.INVALID, "input_ids: expected a non-empty list of token ids")
            return
        limit = params.get("max_new_tokens")
        left = min(limit or self._dials.context_length, self._dials.context_length - len(ids))
        self._requests[rid] = _Request(ids[0], len(ids), left, len(ids))
        self._wake.set()

    def abort(self, rid: str) -> None:
        request = self._requests.get(rid)
        if request is not None:
            request.aborted = True
            self._wake.set()

    async def control(self, op: str, args: dict[str, Any]) -> Any:
        if op == "clear_kv_blocks":
            return {"status": "success", "message": "KV cache cleared"}
        if op != "route":
            raise ValueError(f"unknown control {op!r}")
        assert self._sink is not None
        paused, asleep = self._serving.paused, self._serving.asleep
        match args["path"]:
            case "pause_generation":
                paused = True
            case "continue_generation":
                paused = False
            case "release_memory_occupation":
                asleep = True
            case "resume_memory_occupation":
                asleep = False
            case "fault" if args["body"].get("kind") in FAULTS:
                return await self._break(args["body"]["kind"], float(args["body"]["seconds"]))
            case path:
                raise RequestError(Code.UNKNOWN, f"no engine route {path!r}")
        self._serving = Serving(self._incarnation, paused, asleep)
        self._sink.serving(Serving(self._incarnation, paused or asleep, asleep))
        self._wake.set()
        return {"status": "ok"}

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        for child in self._children:
            child.kill()
            child.wait()

    async def _break(self, kind: str, seconds: float) -> dict[str, str]:
        self._fault, self._fault_until = kind, time.monotonic() + seconds
        if kind == "loop":
            asyncio.get_running_loop().call_later(0.1, time.sleep, seconds)  # after the answer
        elif kind == "update":
            await asyncio.sleep(seconds)
        return {"status": "ok"}

    def _broken(self, *kinds: str) -> bool:
        return self._fault in kinds and time.monotonic() < self._fault_until

    def numbers(self) -> dict[str, float]:
        """As SGLang's schedulers (procs.engine.adapter.scheduler)."""
        at, running = self._step_at, min(len(self._requests), self._dials.max_running_requests)
        return {
            "scheduler_steps_dp0": self._steps,
            "scheduler_outputs_dp0": self._outputs,
            "scheduler_busy_dp0": float(bool(self._requests)),
            "scheduler_step_seconds_dp0": 0.0 if at is None else time.monotonic() - at,
            "running_dp0": running,
            "waiting_dp0": len(self._requests) - running,
        }

    async def _run(self) -> None:
        assert self._sink is not None
        dials = self._dials
        next_report = 0.0
        while True:
            if not self._requests or self._serving.paused:
                self._wake.clear()
                await self._wake.wait()
            if dials.fault == "hang":
                await asyncio.sleep(3600)
            began = time.monotonic()
            if self._broken("deadlock", "update"):
                await asyncio.sleep(dials.step_seconds)
                continue
            self._steps += 1
            self._step_at = began
            if self._broken("step"):
                await asyncio.sleep(max(0.0, self._fault_until - began))
            self._step_at = None
            if self._broken("prefill"):
                await asyncio.sleep(dials.step_seconds)
                continue
            self._outputs += 1
            running = list(self._requests)[: dials.max_running_requests]
            self._sink.step([row for rid in running if (row := self._step(rid, self._requests[rid]))])
            if began >= next_report:
                next_report = began + 1.0
                self._report()
            await asyncio.sleep(max(0.0, dials.step_seconds - (time.monotonic() - began)))

    def _step(self, rid: str, request: _Request) -> tuple[str, list[int]] | None:
        """The request's new tokens; None when they have gone to the sink with more than that."""
        assert self._sink is not None
        if request.aborted:
            del self._requests[rid]
            self._sink.output(rid, [], {"type": "abort", "message": "Aborted"}, self._meta(request))
            return None
        count = min(self._dials.tokens_per_step, request.left)
        tokens = [token_at(request.first, request.position + i, self._dials.vocab_size) for i in range(count)]
        first = request.done == 0
        request.position += count
        request.left -= count
        request.done += count
        if self._broken("lost"):
            request.left += count  # the stream goes on when they come through again, with a hole that nobody is told of
            return None
        finish = {"type": "length", "length": request.done} if request.left == 0 else None
        if finish is not None:
            del self._requests[rid]
        if not first and finish is None:
            return rid, tokens
        self._sink.output(rid, tokens, finish, self._meta(request))
        return None

    @staticmethod
    def _meta(request: _Request) -> dict[str, Any]:
        return {"prompt_tokens": request.prompt, "completion_tokens": request.done, "cached_tokens": 0}

    def _report(self) -> None:
        assert self._sink is not None
        used = sum(r.position // BLOCK_SIZE + 1 for r in self._requests.values())
        total = self._dials.total_kv_blocks
        self._sink.kv_use(KvUse(self._incarnation, 0, used, total, 0, used / total, 0.0))
