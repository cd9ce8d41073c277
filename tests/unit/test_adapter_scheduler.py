"""The watch beside a scheduler: what it writes, and what is read of it, also when SGLang has none of what it looks for."""

import pickle
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from procs.engine.adapter import scheduler as module
from procs.engine.adapter.scheduler import Sample, Schedulers, Watch, combined, file_of


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class Sender:
    """SGLang's SenderWrapper."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send_output(self, output: Any, recv_obj: Any = None) -> None:
        self.sent.append((output, recv_obj))


class Scheduler:
    """As far as the watch looks at it; ``more`` in place of what 0.5.23 has."""

    def __init__(self, **more: Any) -> None:
        self.forward_ct = 0
        self.cur_batch_for_debug: Any = None
        self.running_batch = SimpleNamespace(reqs=[])
        self.waiting_queue: list[int] = []
        self.ipc_channels = SimpleNamespace(send_to_detokenizer=Sender(), send_to_tokenizer=Sender())
        self.disagg_decode_transfer_queue = SimpleNamespace(queue=[1, 2])
        self.__dict__.update(more)

    def ingest_requests(self) -> list[str]:
        return ["request"]


def test_what_a_scheduler_counts_is_read_by_the_engine() -> None:
    fake = Scheduler()
    watch = Watch(fake, file_of(1, 0, 0))
    schedulers = Schedulers()
    assert schedulers.numbers() == {}, "nothing was seen yet"
    watch.look()
    assert schedulers.numbers()["scheduler_busy_dp1"] == 1.0, "two requests wait for their KV cache"
    fake.forward_ct, fake.cur_batch_for_debug = 3, object()
    fake.running_batch.reqs, fake.waiting_queue = [1, 2], [3]
    sender = fake.ipc_channels.send_to_detokenizer
    sender.send_output(SimpleNamespace(rids=["a"]), "back")
    sender.send_output(SimpleNamespace(rids=[]))  # an idle batch
    sender.send_output(SimpleNamespace(rids=None))
    assert fake.ingest_requests() == ["request"] and sender.sent[0][1] == "back" and len(sender.sent) == 3
    watch.look()
    numbers = schedulers.numbers()
    assert 0 <= numbers.pop("scheduler_step_seconds_dp1") < 1
    assert 0 <= time.monotonic() - numbers.pop("scheduler_sampled_at_dp1") < 5
    assert numbers == {
        "scheduler_steps_dp1": 3, "scheduler_outputs_dp1": 1, "scheduler_loops_dp1": 1, "scheduler_busy_dp1": 1.0,
        "running_dp1": 2, "waiting_dp1": 1, "scheduler_transfers_dp1": 2, "scheduler_to_detokenizer_dp1": 1,
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Receiver:
    """SGLang 0.5.16's SchedulerRequestReceiver: its methods can't be replaced one instance at a time."""

    answer: str

    def recv_requests(self, *, wait: bool = False) -> str:
        return self.answer


def test_what_can_not_be_changed_is_counted_as_well() -> None:
    ours, other = Receiver("ours"), Receiver("other")
    counter = module.Counter()
    assert counter.of(ours, "recv_requests") and not counter.of(ours, "ingest_requests")
    assert (ours.recv_requests(wait=True), other.recv_requests(), ours.recv_requests()) == ("ours", "other", "ours")
    assert counter.count == 2


def test_a_rank_is_as_far_as_the_last_of_its_processes() -> None:
    def sample(steps: int, step_at: float, batch: float, at: float = 100.0) -> Sample:
        return Sample(
            steps,
            outputs=steps,
            loops=9,
            running=1,
            waiting=0,
            transfers=0,
            to_detokenizer=steps,
            step_at=step_at,
            batch=batch,
            at=at,
        )

    numbers = combined([sample(7, 99.0, 1.0), sample(6, 40.0, 1.0, at=99.5)], now=100.0)
    assert numbers["scheduler_sampled_at"] == 99.5, "all of them are at least as new"
    assert (numbers["scheduler_steps"], numbers["scheduler_outputs"], numbers["scheduler_step_seconds"]) == (6, 13, 60.0)
    assert combined([sample(7, 40.0, 0.0)], now=100.0)["scheduler_step_seconds"] == 0.0 and combined([], 1.0) == {}


def test_a_sample_that_is_half_written_is_not_taken() -> None:
    watch = Watch(Scheduler(forward_ct=5), file_of(0, 0, 0))
    watch.look()
    schedulers = Schedulers()
    assert schedulers.numbers()["scheduler_steps_dp0"] == 5
    with file_of(0, 0, 0).open("r+b") as file:
        file.write(b"\xff" * 16)
    assert schedulers.numbers()["scheduler_steps_dp0"] == 5


@pytest.mark.parametrize("gone", ["forward_ct", "ipc_channels", "running_batch", "waiting_queue", "cur_batch_for_debug"])
def test_an_sglang_without_it_is_watched_as_far_as_it_goes(gone: str, caplog: pytest.LogCaptureFixture) -> None:
    fake = Scheduler()
    del fake.__dict__[gone]
    watch = Watch(fake, file_of(0, 0, 0))
    watch.look()
    assert Schedulers().numbers()["scheduler_steps_dp0"] == 0
    assert ("is not counted" in caplog.text) == (gone in ("forward_ct", "ipc_channels"))


def test_the_thread_looks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_SECONDS", 0.01)
    fake = Scheduler()
    Watch(fake, file_of(0, 0, 0)).start()
    fake.forward_ct = 8
    deadline, schedulers = time.monotonic() + 5, Schedulers()
    while schedulers.numbers().get("scheduler_steps_dp0") != 8:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_spawn_can_pickle_the_entry_point() -> None:
    assert pickle.loads(pickle.dumps(module.run_scheduler)) is module.run_scheduler
