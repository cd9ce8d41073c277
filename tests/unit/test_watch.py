"""The picture of `sgnode status --watch`: it fits, it says what matters first, and its words do without colours."""

import io
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, Group

from procs.cli import watch
from procs.cli.status import GONE
from procs.cli.view import ASCII, UNICODE, Glyphs, Seen, bar, curve, picture

NOW = 1_764_000_000.0


def process(name: str, state: str = "ready", **more: Any) -> dict[str, Any]:
    return {"name": name, "pid": 4242, "state": state, "detail": "", "uptime_s": 61.0, "restarts": 0, "rss_mb": 42.1, **more}


def document(**more: Any) -> dict[str, Any]:
    names = ("coordinator", "relay", "keeper", "engine", "prober", "agent:0", "agent:1", "frontend")
    return {
        "name": "gpu-7", "version": "0.1.0", "role": "aggregated", "node_rank": 0, "state": "ready", "reason": "",
        "since": NOW - 250, "waiting_for": "", "registered": True, "inflight": 12, "incarnation": 1,
        "ports": {"http": 38925, "system": 38999}, "processes": [process(name) for name in names], "streams": 12,
        "tokens_per_s": 12_345.6, "ttft": {"p50_s": 0.0421, "p99_s": 1.234, "samples": 7},
        "itl": {"p50_s": 0.0081, "p99_s": 0.0205, "samples": 900}, "kv": [rank(0, 640)], "last_load_s": 41.3, **more,
    }  # fmt: skip


def rank(number: int, used: int, waiting: int = 3) -> dict[str, Any]:
    return {"dp_rank": number, "used_blocks": used, "total_blocks": 2048, "waiting": waiting, "prefix_hit_rate": 0.25}


def shown(found: dict[str, Any], *, width: int = 80, height: int = 24, glyphs: Glyphs = UNICODE, **seen: Any) -> list[str]:
    return [line.plain for line in picture(found, Seen(**seen), width=width, height=height, glyphs=glyphs, now=NOW)]


def line(lines: list[str], start: str) -> str:
    return next(each for each in lines if each.strip().startswith(start))


def test_what_matters_is_there_on_80_by_24() -> None:
    lines = shown(document(), rates=[0.0, 50.0, 100.0])
    assert lines[0].startswith("node gpu-7: ready for 4m10s") and lines[0].endswith("every 1 s")
    assert line(lines, "streams").split("  ▁")[0].split() == ["streams", "12", "waiting", "3", "tokens/s", "12,346"]
    assert line(lines, "streams").endswith(" ▁▅█")
    assert line(lines, "TTFT") == "  TTFT     p50 42 ms  p99 1.2 s   ITL p50 8.1 ms  p99 20 ms"
    assert "31%  640 of 2,048 blocks, prefix hits 25%" in line(lines, "KV use")
    assert [each.split()[0] for each in lines if each.split()[1:2] == ["4242"]][-1] == "frontend" and lines[-1] == "q leaves"


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 12), (40, 10), (200, 60), (20, 3)])
@pytest.mark.parametrize("glyphs", [UNICODE, ASCII])
def test_it_always_fits(width: int, height: int, glyphs: Glyphs) -> None:
    crash = {"at": NOW - 5, "reason": "engine (pid 1) killed by SIGKILL " * 5, "path": "/run/x"}
    many = document(
        state="failed",
        reason="r" * 300,
        waiting_for="`sgnode restart engine`",
        kv=[rank(i, 100 * i) for i in range(16)],
        last_crash=crash,
        last_log=[f"line {i} " + "x" * 200 for i in range(15)],
        processes=[process(f"agent:{i}", detail="d" * 100) for i in range(12)] + [process("engine", "failed")],
        drain={"streams": 3, "left_s": 10.0, "of_s": 300.0},
    )
    for found, gone_at in ((many, None), (many, NOW - 1), (document(), None), ({}, None)):
        lines = shown(found, width=width, height=height, glyphs=glyphs, rates=[1.0] * 300, trouble="t" * 300, gone_at=gone_at)
        assert len(lines) <= height and max(map(len, lines)) <= width
        assert glyphs is UNICODE or all(each.isascii() for each in lines)


def test_without_room_the_processes_that_are_well_go_first_and_are_counted() -> None:
    processes = [process(f"agent:{i}") for i in range(20)] + [
        process("engine", "failed", detail="why"),
        process("keeper", "lost"),
    ]
    lines = shown(document(processes=processes))
    assert any("failed" in each and "why" in each for each in lines) and any("lost" in each for each in lines)
    left = next(each for each in lines if "more, all well" in each)
    assert int(left.split()[2]) + sum(each.startswith("agent:") for each in lines) == 20


def test_the_end_of_a_crashs_log_is_kept() -> None:
    crash = {"at": NOW - 5, "reason": "killed", "path": "/run/x"}
    lines = shown(document(state="failed", last_crash=crash, last_log=[f"line {i}" for i in range(15)]))
    assert "    | line 14" in lines and "    | line 0" not in lines and any("last crash 5s ago: killed" in each for each in lines)


def test_progress_of_a_load_and_of_a_drain() -> None:
    lines = shown(document(state="loading", reason="loading m: weights 3/8 shards, 38 %", loading_since=NOW - 20))
    assert line(lines, "load ").endswith("20 s; the last one took 41 s") and any("3/8 shards" in each for each in lines)
    first = shown(document(state="loading", last_load_s=None, loading_since=NOW - 20))
    assert not any(each.startswith("  load ") for each in first)
    drain = shown(document(state="draining", drain={"streams": 12, "left_s": 280.0, "of_s": 300.0}))
    assert line(drain, "drain").endswith("12 streams left, 280 s of 300")


def test_kv_use_of_many_ranks_shares_lines_and_none_says_why() -> None:
    lines = shown(document(kv=[rank(i, 512) for i in range(8)]))
    assert "dp7 ██░░░░░░  25% (3)" in "\n".join(lines) and "waiting 24" in line(lines, "streams")
    assert "--enable-metrics" in line(shown(document(kv=[])), "KV use")
    assert not any("KV use" in each for each in shown(document(kv=[], state="loading"))), "there is nothing to report yet"


def test_a_node_that_has_gone_shows_no_old_figures() -> None:
    lines = shown(document(state="draining", reason="the node is stopping"), trouble="no node is running", gone_at=NOW - 12)
    assert lines[1:3] == ["  no node is running", "  last heard 12s ago: draining, the node is stopping"]
    assert not any("streams" in each or "agent:0" in each for each in lines)


def test_a_document_of_an_older_coordinator_is_shown_too() -> None:
    old = {"name": "n", "state": "ready", "processes": [process("engine")]}
    lines = shown(old)
    assert line(lines, "streams") and line(lines, "TTFT") == "  TTFT     -   ITL -"


def test_without_colours_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    console.print(Group(*picture(document(state="unhealthy"), Seen(), width=80, height=24, now=NOW)))
    text = out.getvalue()
    assert "unhealthy" in text and "\x1b[1" in text, "bold stays"
    assert not any(f"\x1b[{code}m" in text for code in ("31", "32", "33", "36", "1;31", "1;32"))


@pytest.mark.parametrize("glyphs", [UNICODE, ASCII])
def test_bars_and_curves(glyphs: Glyphs) -> None:
    for part in (-1.0, 0.0, 0.03, 0.5, 0.999, 1.0, 7.0):
        assert len(bar(part, 20, glyphs)) == 20
    assert bar(0.0, 4, glyphs) == glyphs.empty * 4 and bar(1.0, 4, glyphs) == glyphs.steps[-1] * 4
    assert curve([5.0, 0.0, 10.0], 2, glyphs) == glyphs.curve[0] + glyphs.curve[-1]
    assert curve([0.0, 0.0], 9, glyphs) == glyphs.curve[0] * 2 and curve([1.0], 0, glyphs) == "" == curve([], 5, glyphs)


# --- looking ---------------------------------------------------------------------------------------------------------


def test_a_look_says_who_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def raising(error: Exception) -> None:
        def document_of(_directory: Path) -> dict[str, Any]:
            raise error

        monkeypatch.setattr(watch, "document_of", document_of)

    assert TimeoutError in GONE[0].__subclasses__(), "a slow supervisord must be told from one that is gone"
    raising(TimeoutError())
    assert watch.look(tmp_path).trouble == "supervisord does not answer"
    raising(ConnectionRefusedError())
    assert "no node is running" in watch.look(tmp_path).trouble


def test_the_asker_says_since_when_it_waits_and_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hangs, news = threading.Event(), threading.Event()

    def document_of(_directory: Path) -> dict[str, Any]:
        hangs.wait(10)
        return {"state": "ready"}

    monkeypatch.setattr(watch, "document_of", document_of)
    asker = watch._Asker(tmp_path, 0.1, news.set)
    asker.start()
    while asker.asked_at is None:
        time.sleep(0.001)
    assert not asker.answers
    hangs.set()
    assert news.wait(5) and asker.answers.popleft().document == {"state": "ready"}


def test_a_start_up_is_shown_while_it_goes_on() -> None:
    going = {"incarnation": 1, "begun": NOW - 30, "done": False, "seconds": 25.0, "current": "weights", "since": NOW - 5}
    phases = {"check": 4.7, "processes": 0.4, "keeper": 0.3, "imports": 9.6, "children": 9.0, "init": 1.0}
    lines = shown(document(state="loading", startup={**going, "phases": phases}))
    assert "  start-up: 30.0 s so far = check 4.7, processes 0.4, keeper 0.3, imports 9.6," in lines
    assert "    SGLang's processes 9.0, init 1.0, weights for 5.0 so far" in lines
    assert not any(
        "start-up" in line for line in shown(document(startup={**going, "done": True, "current": None, "phases": phases}))
    )
