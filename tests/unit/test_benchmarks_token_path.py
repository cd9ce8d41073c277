"""The token path's benchmark: its arithmetic, its loads, its refusals, and a record that is whole after every load."""

import asyncio
import json
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from benchmarks.token_path import __main__ as program
from benchmarks.token_path import options, outputs, paired, plot, processes, record, table
from benchmarks.token_path.clients import LoadError
from benchmarks.token_path.drive import Done, Part, arrivals
from benchmarks.token_path.figures import figures, steady, tokens_within
from benchmarks.token_path.load import SPECIAL, Load, Request, prompt
from benchmarks.token_path.measure import summary
from benchmarks.token_path.processes import Used
from benchmarks.token_path.side import Wanted, together
from benchmarks.token_path.stream import Http

LOAD = Load(streams=3, requests=2, input=8, output=4, vocab=300, seed=100)


def request(stream: int, began: float, *times: float, tokens: int | None = None, ended: float | None = None) -> Request:
    """One token an arrival unless said otherwise; it ends with the last."""
    made = Request(stream, began, ended if ended is not None else times[-1], array("d", times))
    made.chunks, made.tokens = len(times), len(times) if tokens is None else tokens
    return made


# --- arithmetic ----------------------------------------------------------------------------------------------------------


def test_the_steady_window_begins_when_all_have_ended_one_and_ends_when_the_first_is_through() -> None:
    streams = [request(0, 0, 2), request(1, 0, 3), request(0, 2, 5), request(1, 3, 4.5), request(0, 5, 8), request(1, 4.5, 6)]
    assert steady(streams) == (3, 6)
    assert steady(streams[:2]) is None


def test_tokens_at_the_edges_of_the_window_count_by_the_gap_before_them() -> None:
    assert tokens_within(request(0, 0, 1, 2, 3, 4), 2, 9) == 2
    assert tokens_within(request(0, 0, 1, 2, tokens=10), 1.5, 9) == 2.5
    assert tokens_within(request(0, 0, tokens=8, ended=4), 1, 3) == 4
    assert tokens_within(request(0, 1, 2), 2, 3) == 0
    assert tokens_within(request(0, 1, 2, 3), 0, 3) == 2
    assert tokens_within(request(0, 0, 1, 3, tokens=40), 0, 2.99) == pytest.approx(40, abs=0.2)


def test_figures_of_two_streams() -> None:
    found = figures([
        request(0, 0.0, 0.1, 0.2), request(0, 0.2, 0.3, 0.6), request(1, 0.0, 0.2, 0.4), request(1, 0.4, 0.5, 0.8),
    ])  # fmt: skip
    assert (found["requests"], found["tokens"], found["seconds"]) == (4, 8, 0.8)
    assert found["tokens_per_s_whole"] == 10.0
    assert found["window_s"] == pytest.approx(0.2)
    assert found["tokens_per_s"] == pytest.approx(10.0)  # two thirds of one gap; a whole one and a third
    assert found["requests_per_s"] == 5.0
    assert (found["ttft_p50"], found["ttft_p99"]) == (100.0, 200.0)
    assert found["itl_p50"] == found["itl_p99"] == 300.0
    assert found["tokens_per_chunk"] == found["tokens_per_arrival"] == 1.0


def test_where_only_ends_are_seen_there_is_a_rate_and_no_latency() -> None:
    found = figures([request(0, 0, tokens=100, ended=2), request(0, 2, tokens=100, ended=4)])
    assert (found["tokens_per_s"], found["window_s"]) == (50.0, 2)
    assert found["ttft_p50"] is found["itl_p99"] is found["tokens_per_chunk"] is None
    with pytest.raises(ValueError, match="without requests"):
        figures([])


def test_cpu_by_process_is_of_the_load_alone() -> None:
    before = {(1, 0.0): Used("engine", 5.0, 0), (2, 0.0): Used("agent:0", 1.0, 0)}
    after = {
        (1, 0.0): Used("engine", 5.5, 2**20),
        (2, 9.0): Used("agent:0", 0.25, 2**20),
        (3, 0.0): Used("frontend", 0.25, 2**20),
    }
    found = summary([Done([request(0, 0, 1, tokens=1000)], 0.4, 0.5)], before, after)
    assert found["cpu_ms_per_1000_by_process"] == {"agent:0": 250.0, "engine": 500.0, "frontend": 250.0}
    assert found["cpu_ms_per_1000"] == 1000.0
    assert found["tokens_per_core_s"] == pytest.approx(1000 / 0.75, rel=1e-3)
    assert (found["clients_busiest"], found["peak_rss_mib"]["engine"]) == (0.8, 1.0)


# --- loads ---------------------------------------------------------------------------------------------------------------


def test_no_two_prompts_begin_alike() -> None:
    assert len({tuple(prompt(seed, 16, 300)[:3]) for seed in range(20_000)}) == 20_000
    assert min(min(prompt(seed, 64, 300)) for seed in range(400)) >= SPECIAL
    assert max(max(prompt(seed, 64, 300)) for seed in range(400)) < 300


class Fake:
    """A source that answers at once, and keeps what it was asked."""

    def __init__(self, tokens: int = 4) -> None:
        self.asked: list[list[int]] = []
        self.running = self.most = 0
        self._tokens = tokens

    def use(self, way: str) -> None: ...

    def prepare(self, ids: list[int], output: int) -> list[int]:
        return ids

    async def run(self, prepared: list[int], request: Request) -> None:
        self.asked.append(prepared)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        request.tokens, request.ended = self._tokens, time.monotonic()


def test_a_closed_loop_is_sent_whole_by_all_its_processes_together() -> None:
    source = Fake()
    parts = [Part(LOAD, index, 2, source) for index in range(2)]
    for part in parts:
        asyncio.run(part.run(time.monotonic()))
    assert sorted(one.stream for part in parts for one in part.done) == [0, 0, 1, 1, 2, 2]
    assert sorted(source.asked) == sorted(prompt(seed, 8, 300) for seed in range(100, 106))
    assert source.most == 2  # streams 0 and 2 in one process, one request each at a time


def test_a_stream_without_all_its_tokens_fails_the_load() -> None:
    with pytest.raises(RuntimeError, match="3 tokens instead of 4"):
        asyncio.run(Part(LOAD, 0, 1, Fake(tokens=3)).run(time.monotonic()))


def test_no_third_request_is_sent_when_the_time_is_over() -> None:
    part = Part(Load(**{**vars(LOAD), "at_most": 1.0, "requests": 4}), 0, 1, Fake())
    asyncio.run(part.run(time.monotonic() - 2))
    assert len(part.done) == 6  # two of each stream


def test_an_open_loop_has_the_same_times_for_all_and_shares_them_out() -> None:
    load = Load(**{**vars(LOAD), "rate": 200.0, "at_most": 0.2})
    times = arrivals(load)
    assert times == arrivals(Load(**{**vars(load), "seed": 9})) == sorted(times)
    assert len(times) == pytest.approx(40, abs=20)
    parts = [Part(load, index, 3, Fake()) for index in range(3)]
    for part in parts:
        asyncio.run(part.run(time.monotonic() - 1))
    assert sorted(one.stream for part in parts for one in part.done) == list(range(len(times)))


def stream_of(*pieces: bytes, status: int = 200) -> Request:
    """What the client makes of an answer that comes in these pieces."""

    async def answer(asked: web.Request) -> web.StreamResponse:
        body = await asked.json()
        assert (body["prompt"], body["max_tokens"], body["stream"]) == ([1, 2], 4, True)
        reply = web.StreamResponse(status=status)
        await reply.prepare(asked)
        for piece in pieces:
            await reply.write(piece)
            await asyncio.sleep(0.01)
        return reply

    async def run() -> Request:
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        made = Request(0, time.monotonic())
        try:
            async with aiohttp.ClientSession() as session:
                http = Http(session, f"http://{host}:{port}", "model")
                await http.run(http.prepare([1, 2], 4), made)
        finally:
            await runner.cleanup()
        return made

    return asyncio.run(run())


EVENT = b'data: {"choices":[{"text":"a"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":4}}\n\n'


def test_a_stream_is_counted_by_its_events_wherever_reads_cut_them() -> None:
    found = stream_of(EVENT, EVENT[:3], EVENT[3:] + EVENT, USAGE + b"data: [DONE]\n\n")
    assert (found.chunks, found.tokens) == (3, 4)
    assert len(found.arrivals) <= 3
    assert found.began < found.arrivals[0] <= found.arrivals[-1] <= found.ended


def test_a_stream_that_ends_early_or_an_error_is_no_result() -> None:
    with pytest.raises(RuntimeError, match="without its usage"):
        stream_of(EVENT, b'data: {"error":{"message":"gone"}}\n\n')
    with pytest.raises(RuntimeError, match="status 503"):
        stream_of(b"busy", status=503)


# --- processes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["/venv/bin/python", "-m", "procs.agent", "2"], "agent:2"),
        (["/venv/bin/python", "-m", "procs.keeper"], "keeper"),
        (["python -m procs.engin", "", ""], "engine"),
        (["/venv/bin/python", "-m", "procs.engine.start"], "engine"),
        (["sglang::scheduler_TP0", ""], "scheduler"),
        (["python", "-W", "ignore", "-m", "dynamo.sglang", "--model-path", "x"], "dynamo worker"),
        (["python", "-c", "from multiprocessing.resource_tracker import main;main(5)"], "resource tracker"),
        (["/usr/bin/etcd", "--x"], "etcd"),
        ([], "?"),
    ],
)
def test_processes_are_named_by_what_they_are(command: list[str], name: str) -> None:
    assert processes.name_of(command) == name


def test_a_sides_processes_are_found_and_ended_with_their_children(tmp_path: Path) -> None:
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '600'], env={}).pid, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], env={processes.MARK: str(tmp_path)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        found = processes.snapshot(str(tmp_path))
        assert {pid for pid, _ in found} == {parent.pid, child}
        assert processes.peak_rss(found)["sleep"] > 0
        processes.end(str(tmp_path))
        assert processes.marked(str(tmp_path)) == []


# --- the run -------------------------------------------------------------------------------------------------------------


def test_sides_by_name() -> None:
    sides = [Wanted.parse(text) for text in ("raw", "ceiling", "ceiling/20", "dynamo", "raw/20", "sgnode/20")]
    assert [str(side) for side in sides] == ["raw", "ceiling", "ceiling/20", "dynamo", "raw/20", "sgnode/20"]
    assert [len(start) for start in together(sides)] == [2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["--sides", "raw,vllm"], "--sides"),
        (["--sides", "synthetic/20"], "--sides"),
        (["--agents", "1,2"], "--agents"),
        (["--streams", "0"], "--streams"),
        (["--rounds", "x"], "--rounds"),
        (["--open-rate", "-1"], "--open-rate"),
        (["--at-most", "0"], "--at-most"),
        (["--shape", "8b"], "--shape"),
        (["--model", "/nowhere"], "--model"),
        (["--record", "/nowhere/run.json"], "--record"),
        (["--tp-size", "2"], "--tp-size"),
    ],
)
def test_bad_input_is_one_line_that_names_the_flag(argv: list[str], flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        options.parse(argv)
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1)
    assert flag in said


def test_flags_after_the_dashes_are_sglangs(tmp_path: Path) -> None:
    found = options.parse(["--model", str(tmp_path), "--shape", "0.3b", "--", "--device", "cpu"])
    assert found.flags == ["--device", "cpu", "--load-format", "dummy"]


def test_other_texts_are_seen_and_broken_characters_are_not() -> None:
    same = {"raw": ["one fox", "two\ufffd"], "sgnode": ["one fox", "two"]}
    assert outputs.difference(same) is None
    assert outputs.difference({**same, "dynamo": ["one fox", "tw0"]}) == (
        "prompt 1: raw and dynamo differ from character 2 on: 'o' and '0'"
    )


class FakeSide:
    """A side that answers from nothing; ``fails`` at that load."""

    def __init__(self, texts: list[str], fails: int | None = None) -> None:
        self._texts, self._fails, self.loads = texts, fails, 0
        self.scaled: list[int] = []

    def start(self) -> None: ...

    def become(self, wanted: Wanted) -> None: ...

    def scale(self, agents: int) -> None:
        self.scaled.append(agents)

    def outputs(self, prompts: list[list[int]], output: int) -> list[str]:
        return self._texts[: len(prompts)]

    def run(self, load: Load, started: Callable[[], None]) -> list[Done]:
        self.loads += 1
        if self.loads == self._fails:
            raise LoadError("3 tokens instead of 4")
        started()
        times = [float(number) for number in range(1, load.output + 1)]
        return [Done([request(n, 0.0, *times) for n in range(load.streams)], 0.1, 1.0)]

    def close(self) -> None: ...


def played(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sides: dict[str, FakeSide], *argv: str
) -> tuple[int, dict[str, Any], list[int]]:
    """Run the program on these sides: its exit code, its record, and how many loads each write of the record had."""
    (tmp_path / "config.json").write_text('{"vocab_size": 300}')
    target, written = tmp_path / "run.json", []
    monkeypatch.setattr(program, "make", lambda wanted, *_: sides[str(wanted)])
    save = record.Record.save

    def saved(self: record.Record) -> None:
        save(self)
        written.append(len(json.loads(target.read_text())["loads"]))

    monkeypatch.setattr(record.Record, "save", saved)
    arguments = [
        "--model",
        str(tmp_path),
        "--record",
        str(target),
        "--sides",
        ",".join(sides),
        "--output-tokens",
        "4",
    ]
    monkeypatch.setattr(sys, "argv", ["token_path", "--rounds", "1", *arguments, *argv])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return program.main(), json.loads(target.read_text()), written


def test_a_run_keeps_every_load_as_it_comes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = {"dynamo": FakeSide(["a"] * 8), "sgnode": FakeSide(["a"] * 8)}
    code, document, written = played(monkeypatch, tmp_path, sides, "--agents", "2,1", "--streams", "1,8", "--open-rate", "5")
    assert code == 0
    assert sides["sgnode"].scaled == [2, 1]
    assert [record.label(load) for load in document["loads"]] == ["dynamo"] * 3 + ["sgnode x2"] * 3 + ["sgnode x1"] * 3
    assert {load["load"] for load in document["loads"]} == {"1 streams", "8 streams", "5 requests/s"}
    assert sorted(set(written)) == list(range(10))
    assert {"date", "command", "host", "versions", "run", "starts", "texts"} <= document.keys()
    assert (document["refused"], document["failures"]) == (None, [])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("1 streams", "8 streams", "5 requests/s", "sgnode x2", "peak RSS"))
    assert plot.points(document["loads"], "itl_p50")["sgnode x1"] == [(1, 1000.0, 1000.0, 1000.0), (8, 1000.0, 1000.0, 1000.0)]


def test_sides_that_are_up_at_once_are_loaded_in_turns_and_compared_within_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = {name: FakeSide(["a"] * 8) for name in ("dynamo", "dynamo/20", "sgnode")}
    flags = ("--at-once", "--agents", "2,1", "--rounds", "2", "--streams", "1")
    code, document, _ = played(monkeypatch, tmp_path, sides, *flags)
    assert code == 0
    passes: dict[int, list[str]] = {}
    for load in document["loads"]:
        passes.setdefault(load["pass"], []).append(record.label(load))
    there = ["dynamo", "dynamo/20", "sgnode x2"]
    assert passes == {0: there, 1: there[::-1], 2: ["dynamo", "sgnode x1"], 3: ["sgnode x1", "dynamo"]}
    shown = capsys.readouterr().out
    assert "1 streams, tok/s of it to" in shown
    assert [line.split()[2:] for line in shown.splitlines() if line.startswith("sgnode x1")][-1] == [
        "0.00",
        "[0.00,",
        "0.00]",
        "-",
    ]


def test_a_pair_is_of_one_pass() -> None:
    def load(side: str, agents: int, number: int, rate: float) -> dict[str, Any]:
        return {"side": side, "agents": agents, "pass": number, "repeat": 0, "tokens_per_s": rate, "itl_p50": None}

    ours = [load("sgnode", 1, number, rate) for number, rate in ((0, 8.0), (1, 2.0), (3, 9.0))]
    theirs = [load("dynamo", 0, number, rate) for number, rate in ((1, 1.0), (0, 2.0), (2, 5.0))]
    assert paired.pairs(ours, theirs, "tokens_per_s") == [4.0, 2.0]
    assert paired.pairs(ours, theirs, "itl_p50") == []
    for one in ours + theirs:
        del one["pass"]
    assert paired.pairs(ours, theirs, "tokens_per_s") == []


def test_sides_with_other_texts_are_not_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = {"dynamo": FakeSide(["a"] * 8), "sgnode": FakeSide(["a"] * 7 + ["b"])}
    code, document, _ = played(monkeypatch, tmp_path, sides)
    said = capsys.readouterr()
    assert (code, said.out) == (1, "")
    assert said.err.splitlines()[-1].startswith("not compared: prompt 7: dynamo and sgnode differ")
    assert document["refused"] and document["texts"]["sgnode"][7] == "b"


def test_a_load_that_fails_ends_its_side_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = {"dynamo": FakeSide(["a"] * 8, fails=3), "sgnode": FakeSide(["a"] * 8)}
    code, document, _ = played(monkeypatch, tmp_path, sides, "--agents", "1", "--streams", "1,8")
    assert code == 1
    assert document["failures"] == [{"side": "dynamo", "round": 0, "error": "3 tokens instead of 4", "logs": {}}]
    assert [record.label(load) for load in document["loads"]] == ["dynamo", "sgnode x1", "sgnode x1"]
    assert "sgnode x1" in capsys.readouterr().out


def test_a_table_shows_the_spread_over_loads_alike() -> None:
    assert table.cell([2.0, 1.0, 3.0], ranged=True) == "2.00 [1.00, 3.00]"
    assert table.cell([2000.0], ranged=True) == "2,000"
    assert table.cell([None], ranged=True) == "-"
