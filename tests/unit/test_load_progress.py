"""Progress of SGLang's load, from lines that it wrote (0.5.23) as supervisord keeps them."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from procs.engine.load_progress import TAIL_BYTES, LoadProgress

OLD = (
    b"2026-11-24 20:40:00 INFO model_runner: Load weight begin. avail mem=19.60 GB\nshards:  50% Completed | 4/8 [00:01<00:01]\r"
)
LINES = [
    (b"2026-11-24 20:46:31,500 INFO engine: server_args={'model_path': '/m'}\n", "starting SGLang's processes"),
    (b"2026-11-24 20:46:39,250 INFO scheduler: Init parallel begin.\n", "connecting SGLang's processes"),
    (b"2026-11-24 20:46:40,000 INFO model_runner.load_model: Load weight begin. avail mem=19.60 GB\n", "reading the weights"),
    (b"\rMulti-thread loading shards:   0% Completed | 0/8 [00:00<?, ?it/s]\r", "weights 0/8 shards, 0 %"),
    (b"\rMulti-thread loading shards:  38% Completed | 3/8 [00:09<00:15,  3.1s/it]\r", "weights 3/8 shards, 38 %"),
    (b"Loading safetensors checkpoint shards: 100% Completed | 8/8 [00:25<00:00, 3.1s/it]\n", "weights 8/8 shards, 100 %"),
    (
        b'{"time":"2026-11-24T20:47:05.010000Z","level":"INFO","message":"Load weight end. elapsed=25.01 s, type=L"}\n',
        "weights loaded, making the KV cache",
    ),
    (b"INFO kv_cache_configurator.configure: Memory pool end. avail mem=19.55 GB\n", "KV cache made, warming up"),
    (b"Capturing batches (bs=64 avail_mem=5.01 GB):  26%|##5       | 9/35 [00:03<00:08]\r", "capturing graphs 9/35"),
]


def test_each_step_is_said_and_what_an_earlier_load_wrote_is_not(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_bytes(OLD)
    marks: dict[str, float] = {}
    progress = LoadProgress(log, marks)
    assert progress.look() == ""
    with log.open("ab", buffering=0) as out:
        for line, words in LINES:
            out.write(line)
            assert progress.look() == words
        out.write(b"x" * 2 * TAIL_BYTES)
        assert progress.look() == LINES[-1][1], "other words in between change nothing"
    log.write_bytes(LINES[0][0])
    assert progress.look() == LINES[0][1], "rotated"
    assert list(marks) == ["imported", "children", "weights", "loaded", "pool"]
    assert (marks["children"] - marks["imported"], marks["weights"] - marks["children"]) == (7.75, 0.75), "the log's own times"
    assert marks["loaded"] == datetime(2026, 11, 24, 20, 47, 5, 10_000, UTC).timestamp()
    log.unlink()
    assert progress.look() == LINES[0][1]


@pytest.mark.parametrize("line", [b"shards: many", b"\xff\xfe", b"Capturing batches"])
def test_what_is_not_understood_is_not_said(tmp_path: Path, line: bytes) -> None:
    progress = LoadProgress(tmp_path / "engine.log", {})
    (tmp_path / "engine.log").write_bytes(line)
    assert progress.look() == ""


def test_a_mark_is_of_the_first_rank_and_of_the_last_graphs(tmp_path: Path) -> None:
    log, marks = tmp_path / "engine.log", dict[str, float]()
    progress = LoadProgress(log, marks)
    lines = [
        "10,0 INFO a: Load weight end.",
        "11,0 INFO b: Load weight end.",
        "12,0 INFO a: Capture target prefill CUDA graph end.",
    ]
    log.write_text(
        "".join(f"2026-11-24 20:46:{line}\n" for line in [*lines, "20,5 INFO a: Capture target decode cuda graph end."])
    )
    progress.look()
    assert marks["captured"] - marks["loaded"] == 10.5


def test_a_line_that_is_cut_is_read_when_it_is_whole(tmp_path: Path) -> None:
    log, marks = tmp_path / "engine.log", dict[str, float]()
    progress = LoadProgress(log, marks)
    with log.open("ab", buffering=0) as out:
        out.write(b"2026-11-24 20:46:10,000 INFO scheduler: Load wei")
        assert progress.look() == "" and not marks
        out.write(b"ght begin.\n")
        assert progress.look() == "reading the weights" and list(marks) == ["weights"]
