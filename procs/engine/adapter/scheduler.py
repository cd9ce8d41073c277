"""What SGLang's schedulers do, as they count it themselves: written in each scheduler's process, read in the engine's.

A scheduler's main thread is at work or stuck, so a thread beside it looks five times a second and writes what it sees into a
file of its own in TMPDIR, without a lock. Nothing is asked of the scheduler's loop but two integer increments.
"""

import inspect
import logging
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from procs.engine.adapter import direct

SAMPLE_SECONDS = 0.2
"""How often a scheduler is looked at."""
PREFIX = "sgnode-scheduler"
LAYOUT = struct.Struct("<Q7q3dQ")
"""A number of the sample, before and after it: what lies between was written in one go when both are alike."""


@dataclass(frozen=True)
class Sample:
    """One look at one scheduler. Times in seconds of the machine's monotonic clock."""

    steps: int
    """Forward passes begun (SGLang's ``forward_ct``)."""
    outputs: int
    """Batches of tokens handed on."""
    loops: int
    """Turns of its loop, also of an idle one."""
    running: int
    waiting: int
    transfers: int
    """Requests that wait for a KV transfer of prefill and decode."""
    to_detokenizer: int
    """Of ``outputs``, those that SGLang's detokenizer was given: each one comes back."""
    step_at: float
    """When ``steps`` grew last."""
    batch: float
    """1 while it has a batch in its hands, from the choice of it to the next choice."""
    at: float


class Counter:
    """Counts the calls of a method of one instance."""

    def __init__(self) -> None:
        self.count = 0

    def of(self, owner: Any, name: str, counts: Callable[..., bool] = lambda *_: True) -> bool:
        """False when there is no such method to wrap."""
        call = getattr(owner, name, None)
        if call is None:
            return False

        def counted(*args: Any, **kwargs: Any) -> Any:
            if counts(*args):
                self.count += 1
            return call(*args, **kwargs)

        try:
            setattr(owner, name, counted)
        except (AttributeError, TypeError):  # a frozen dataclass with slots (0.5.16, SchedulerRequestReceiver)
            kind = type(owner)
            whole = getattr(kind, name)

            def chosen(this: Any, *args: Any, **kwargs: Any) -> Any:
                return counted(*args, **kwargs) if this is owner else whole(this, *args, **kwargs)

            setattr(kind, name, chosen)
        return True


def _carries(output: Any, *_: Any) -> bool:
    """An idle batch of DP attention is sent as well, without a request in it (0.5.23, output_streamer.py)."""
    return bool(getattr(output, "rids", None))


def _sender(scheduler: Any, name: str) -> Any:
    """What it sends tokens with: through the detokenizer, or directly (procs.engine.adapter.direct)."""
    channels = getattr(scheduler, "ipc_channels", scheduler)
    return getattr(channels, name, None)


QUEUES = (
    ("disagg_prefill_bootstrap_queue", "queue"), ("disagg_prefill_inflight_queue", ""), ("disagg_decode_prealloc_queue", "queue"),
    ("disagg_decode_prealloc_queue", "retracted_queue"), ("disagg_decode_transfer_queue", "queue"),
)  # fmt: skip
"""Where requests wait for a KV transfer (0.5.23, Scheduler.is_fully_idle)."""


def _length(owner: Any, *names: str) -> int:
    """Of what is found by these attributes; 0 when it isn't there."""
    for name in names:
        owner = getattr(owner, name, None) if name else owner
    try:
        return len(owner)
    except TypeError:
        return 0


class Watch:
    """Looks at the scheduler of this process from a thread. Reads attributes and lengths only."""

    def __init__(self, scheduler: Any, path: Path) -> None:
        self._scheduler = scheduler
        self._loops, self._to_detokenizer, self._direct = Counter(), Counter(), Counter()
        # With --skip-tokenizer-init SGLang's name for it leads past it.
        self._detokenizes = not getattr(getattr(scheduler, "server_args", None), "skip_tokenizer_init", False)
        missing = [] if hasattr(scheduler, "forward_ct") else ["forward_ct"]
        for name, counter in (("send_to_detokenizer", self._to_detokenizer), ("send_to_tokenizer", self._direct)):
            if not counter.of(_sender(scheduler, name), "send_output", _carries):
                missing.append(name)
        receiver = getattr(scheduler, "request_receiver", None)  # 0.5.16
        if not (self._loops.of(scheduler, "ingest_requests") or self._loops.of(receiver, "recv_requests")):
            missing.append("ingest_requests")
        if missing:
            logging.warning("this SGLang's scheduler has no %s: it is not counted", ", ".join(missing))
        self._number = 0
        self._steps, self._step_at = -1, 0.0
        path.write_bytes(bytes(LAYOUT.size))
        with path.open("r+b") as file:
            self._map = mmap(file.fileno(), LAYOUT.size)

    def start(self) -> None:
        self.look()
        threading.Thread(target=self._run, name="sgnode-watch", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(SAMPLE_SECONDS)
            self.look()

    def look(self) -> None:
        scheduler, now = self._scheduler, time.monotonic()
        steps = int(getattr(scheduler, "forward_ct", 0))
        if steps != self._steps:
            self._steps, self._step_at = steps, now
        batch = getattr(scheduler, "cur_batch_for_debug", getattr(scheduler, "cur_batch", None))
        running = _length(scheduler, "running_batch", "reqs")
        transfers = sum(_length(scheduler, *names) for names in QUEUES)
        self._number += 1
        given = self._to_detokenizer.count
        counts = (steps, given + self._direct.count, self._loops.count)
        lengths = (running, _length(scheduler, "waiting_queue"), transfers)
        times = (self._step_at, float(batch is not None), now)
        self._map[:] = LAYOUT.pack(self._number, *counts, *lengths, given if self._detokenizes else 0, *times, self._number)


def run_scheduler(*args: Any, **kwargs: Any) -> Any:
    """SGLang's entry point of a scheduler's process (``Engine.run_scheduler_process_func``): Dynamo's, with a watch beside it.

    A module's function: spawn pickles it by name.
    """
    try:
        _install(args, kwargs)
    except Exception as error:  # what can't be watched must serve all the same
        logging.warning("the scheduler is not watched: %s: %s", type(error).__name__, error)
    from dynamo.sglang.nixl_telemetry import run_scheduler_process_with_rank_fixups

    return run_scheduler_process_with_rank_fixups(*args, **kwargs)


def _install(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """When the scheduler's loop starts, its model is loaded: then the watch starts, and the direct way opens."""
    from sglang.srt.managers.scheduler import Scheduler, run_scheduler_process

    ranks = inspect.signature(run_scheduler_process).bind(*args, **kwargs).arguments
    place = file_of(*(int(ranks.get(f"{name}_rank") or 0) for name in ("dp", "pp", "tp")))
    run = Scheduler.run_event_loop

    def run_event_loop(scheduler: Any) -> None:
        try:
            Watch(scheduler, place).start()
        except Exception as error:
            logging.warning("the scheduler is not watched: %s: %s", type(error).__name__, error)
        try:
            direct.install(scheduler)
        except Exception as error:
            logging.warning("tokens go through the detokenizer: %s: %s", type(error).__name__, error)
        run(scheduler)

    Scheduler.run_event_loop = run_event_loop


def install() -> None:
    """Before the engine is built. Raises what Dynamo's own wrapper raises for a wrong NIXL environment."""
    from dynamo.sglang.nixl_telemetry import install_scheduler_process_wrapper

    install_scheduler_process_wrapper()
    from sglang.srt.entrypoints.engine import Engine

    if hasattr(Engine, "run_scheduler_process_func"):
        Engine.run_scheduler_process_func = staticmethod(run_scheduler)
    else:
        logging.warning("this SGLang has no Engine.run_scheduler_process_func: its schedulers are not watched")


def file_of(dp: int, pp: int, tp: int) -> Path:
    """In TMPDIR, which is of one incarnation (procs.keeper.life)."""
    return Path(tempfile.gettempdir()) / f"{PREFIX}-{dp}-{pp}-{tp}"


class Schedulers:
    """The files of all schedulers of this engine, read when asked; none may be there."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap] = {}
        self._last: dict[Path, Sample] = {}

    def numbers(self) -> dict[str, float]:
        """By name and DP rank, for Beat.numbers. Any thread may ask, one at a time."""
        ranks: dict[int, list[Sample]] = {}
        for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}-*-*-*"):
            if (sample := self._read(path)) is not None:
                ranks.setdefault(int(path.name.split("-")[-3]), []).append(sample)
        now = time.monotonic()
        return {
            f"{name}_dp{rank}": value for rank, samples in sorted(ranks.items()) for name, value in combined(samples, now).items()
        }

    def _read(self, path: Path) -> Sample | None:
        """The newest whole sample."""
        if path not in self._maps:
            try:
                with path.open("rb") as file:
                    self._maps[path] = mmap(file.fileno(), LAYOUT.size, access=ACCESS_READ)
            except (OSError, ValueError):  # it is just being made
                return None
        for _ in range(3):
            before, *values, after = LAYOUT.unpack(self._maps[path][:])
            if before == after:
                if before:
                    self._last[path] = Sample(*values)
                break
        return self._last.get(path)


def combined(samples: Iterable[Sample], now: float) -> dict[str, float]:
    """One DP rank out of its tensor and pipeline ranks, which step together: it is as far as the last of them.

    ``scheduler_step_seconds``: for how long it has been in one step, 0 when in none. ``scheduler_sampled_at``: the oldest's time.
    """
    all_of = list(samples)
    if not all_of:
        return {}
    busy = [s for s in all_of if s.batch or s.running or s.waiting or s.transfers]
    return {
        "scheduler_steps": min(s.steps for s in all_of),
        "scheduler_outputs": sum(s.outputs for s in all_of),
        "scheduler_loops": min(s.loops for s in all_of),
        "scheduler_busy": float(bool(busy)),
        "scheduler_step_seconds": max((now - s.step_at for s in all_of if s.batch), default=0.0),
        "running": max(s.running for s in all_of),
        "waiting": max(s.waiting for s in all_of),
        "scheduler_transfers": max(s.transfers for s in all_of),
        "scheduler_to_detokenizer": sum(s.to_detokenizer for s in all_of),
        "scheduler_sampled_at": min(s.at for s in all_of),
    }
