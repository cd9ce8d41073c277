"""Crash bundles: bounded in number and size."""

import json
import os
from pathlib import Path

from procs.coordinator import crash
from shared.config import LOG_DIR, NodeConfig


def test_bundles_are_bounded_in_number_and_size(tmp_path: Path) -> None:
    config = NodeConfig(
        name="n", runtime_dir=str(tmp_path), version="1.2.3", role="aggregated", model_path="m", served_model_name="m"
    )
    logs = tmp_path / LOG_DIR
    logs.mkdir()
    for name in ("engine", "agent-0", "relay"):
        with (logs / f"{name}.log").open("w") as file:
            file.writelines(f"{name} line {i:09d}\n" for i in range(150_000))
    targets = [crash.place(tmp_path, number, 1_700_000_000.0 + number) for number in range(7)]
    for number, target in enumerate(targets):
        crash.write(target, config, {"reason": "killed", "at": 1.0, "incarnation": number}, {"state": "failed"})
        os.utime(target, (number, number))
    left = sorted(logs.glob("crash-*"))
    assert left == sorted(targets[2:])
    for bundle in left:
        size = sum(path.stat().st_size for path in bundle.iterdir())
        assert 3_000_000 < size < crash.MOST_BYTES
    end = (left[-1] / "engine.log").read_text().splitlines()
    assert end[-1] == "engine line 000149999" and end[0].startswith("engine line ")
    told = json.loads((left[-1] / "crash.json").read_text())
    assert (told["incarnation"], told["versions"]["sgnode"]) == (6, "1.2.3")


def test_the_last_lines_of_an_engine_are_few_short_and_not_empty(tmp_path: Path) -> None:
    (tmp_path / LOG_DIR).mkdir()
    assert crash.last_lines(tmp_path) == []
    (tmp_path / LOG_DIR / "engine.log").write_text("".join(f"{i}\n\n" for i in range(5000)) + "x" * 9999 + "\n")
    lines = crash.last_lines(tmp_path)
    assert len(lines) == crash.LAST_LINES and lines[-1] == "x" * crash.LINE_LENGTH and lines[-2] == "4999"
