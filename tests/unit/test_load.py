"""The load in the status document: a rate over beats, quantiles over agents, KV use of this life, the last load's time."""

from pathlib import Path
from typing import Any

from procs.coordinator.load import LAST_LOAD_FILE, Load
from shared.frames import Beat, KvUse


class Bench:
    def __init__(self, directory: Path, model: str = "/m") -> None:
        self.now = 50.0
        self.load = Load(directory, model, lambda: self.now)

    def engine(self, tokens: float, incarnation: int = 1, **more: float) -> None:
        self.load.hear(beat("engine", incarnation, tokens=tokens, **more))

    def document(self, *agents: Beat, incarnation: int = 1, up: bool = True) -> dict[str, Any]:
        return self.load.document(agents, incarnation, up=up)


def beat(process: str, incarnation: int = 1, **numbers: float) -> Beat:
    return Beat(process, 100 + incarnation, "ready", "", 0.0, "", incarnation, 0, numbers)


def kv(incarnation: int, rank: int, used: int) -> KvUse:
    return KvUse(incarnation, rank, used, 2048, 3, used / 2048, 0.25)


def test_the_rate_is_the_last_two_seconds_and_starts_anew_with_a_new_engine(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert bench.document()["tokens_per_s"] is None
    for step in range(11):
        bench.engine(step * 100)
        bench.now += 0.5
    assert bench.document()["tokens_per_s"] == 200 and bench.document()["tokens"] == 1000
    for _ in range(5):
        bench.engine(1000)
        bench.now += 0.5
    assert bench.document()["tokens_per_s"] == 0
    bench.engine(4, incarnation=2)
    assert bench.document(incarnation=2)["tokens_per_s"] is None, "not -996 tokens"
    assert bench.document(up=False)["tokens"] is None


def test_kv_use_is_of_the_present_life_only(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.engine(1)
    for frame in (kv(1, 1, 20), kv(1, 0, 10), kv(1, 0, 11)):
        bench.load.hear(frame)
    found = bench.document()["kv"]
    assert [(each["dp_rank"], each["used_blocks"], each["waiting"]) for each in found] == [(0, 11, 3), (1, 20, 3)]
    bench.engine(1, incarnation=2)
    assert bench.document(incarnation=2)["kv"] == []
    bench.load.hear(kv(2, 0, 1))
    assert [each["used_blocks"] for each in bench.document(incarnation=2)["kv"]] == [1]
    assert bench.document(incarnation=2, up=False)["kv"] == []


def test_latencies_of_agents_become_one_and_none_without_samples(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    one = beat("agent:0", inflight=2, ttft_p50_seconds=0.1, ttft_p99_seconds=0.2, ttft_samples=30)
    two = beat("agent:1", inflight=1, ttft_p50_seconds=0.5, ttft_p99_seconds=0.9, ttft_samples=10)
    found = bench.document(one, two, beat("agent:2"))
    assert found["ttft"] == {"p50_s": 0.2, "p99_s": 0.9, "samples": 40} and found["itl"] is None and found["streams"] == 3


def test_the_last_load_is_remembered_beside_the_logs_for_the_same_model(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert bench.document()["last_load_s"] is None
    bench.engine(0, load_seconds=41.26)
    assert bench.document()["last_load_s"] == 41.3
    assert Bench(tmp_path).document()["last_load_s"] == 41.3
    assert Bench(tmp_path, "/another").document()["last_load_s"] is None
    (tmp_path / LAST_LOAD_FILE).write_text("{")
    assert Bench(tmp_path).document()["last_load_s"] is None
    Bench(tmp_path / "gone").engine(0, load_seconds=1.0)
