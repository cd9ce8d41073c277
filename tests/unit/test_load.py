"""The load in the status document: a rate over beats, quantiles over agents, KV use of this life, the last load's time."""

from pathlib import Path
from typing import Any

from procs.coordinator.load import LAST_LOAD_FILE, Load
from shared.frames import Beat, KvUse


class Bench:
    def __init__(self, directory: Path, model: str = "/m") -> None:
        self.now = 50.0
        self.load = Load(directory, model, lambda: self.now)

    def engine(self, tokens: float, incarnation: int = 1) -> None:
        self.load.hear(beat("engine", incarnation, tokens=tokens))

    def engine_is(self, state: str, since: float, incarnation: int = 1) -> None:
        self.load.hear(Beat("engine", 7, state, "", since, "", incarnation, 0))

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


def test_a_load_is_timed_and_remembered_beside_the_logs_for_the_same_model(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert bench.document()["last_load_s"] is None
    for _ in range(3):
        bench.engine_is("loading", 1000.0)
    assert bench.document()["loading_since"] == 1000 and bench.document(up=False)["loading_since"] is None
    bench.engine_is("warming", 1030.0)
    assert bench.document()["loading_since"] == 1000
    for _ in range(3):
        bench.engine_is("ready", 1041.26)
    found = bench.document()
    assert (found["last_load_s"], found["loading_since"]) == (41.3, None)
    assert Bench(tmp_path).document()["last_load_s"] == 41.3
    assert Bench(tmp_path, "/another").document()["last_load_s"] is None
    bench.engine_is("loading", 2000.0, incarnation=2)
    bench.engine_is("loading", 2009.0, incarnation=3)
    bench.engine_is("ready", 2010.0, incarnation=3)
    assert bench.document()["last_load_s"] == 1, "not from the life that died while it loaded"
    (tmp_path / LAST_LOAD_FILE).write_text("{")
    again = Bench(tmp_path)
    assert again.document()["last_load_s"] is None
    again.engine_is("ready", 3000.0)
    assert again.document()["last_load_s"] is None, "this coordinator has not seen it begin"
    gone = Bench(tmp_path / "gone")
    gone.engine_is("loading", 1.0)
    gone.engine_is("ready", 3.0)
    assert gone.document()["last_load_s"] == 2
