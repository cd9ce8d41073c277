"""`python -m procs.cli.disagg` with small programs in place of nodes: what is shown, in which order they end, the exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from procs.cli import disagg

NODE = """
import signal, sys, time
name, seconds, code = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
asked = []
def stop(*_):
    asked.append(1)
    print("asked", len(asked), flush=True)
signal.signal(signal.SIGTERM, stop)
print("up", flush=True)
began = None
while len(asked) < 2:
    time.sleep(0.02)
    began = began or (time.monotonic() if asked else None)
    if (began and time.monotonic() - began > seconds) or (code and not asked):
        break
print("gone", flush=True)
sys.exit(code)
"""
PROGRAM = """
import json, os, signal, sys
from procs.cli import disagg
pair = disagg.Pair(json.loads(sys.argv[1]), os.environ)
signal.signal(signal.SIGINT, pair.on_signal)
sys.exit(pair.run())
"""


def started(decode: tuple[float, int], prefill: tuple[float, int]) -> "subprocess.Popen[str]":
    nodes = {
        name: [sys.executable, "-c", NODE, name, *map(str, dials)] for name, dials in (("decode", decode), ("prefill", prefill))
    }
    return subprocess.Popen([sys.executable, "-c", PROGRAM, json.dumps(nodes)], stdout=subprocess.PIPE, text=True)


def read_until(program: "subprocess.Popen[str]", *wanted: str) -> list[str]:
    assert program.stdout is not None
    lines: list[str] = []
    while not set(wanted) <= set(lines):
        line = program.stdout.readline()
        assert line, lines
        lines.append(" ".join(line.split()))
    return lines


def test_a_signal_drains_decode_and_then_prefill() -> None:
    program = started(decode=(0.5, 0), prefill=(0.1, 0))
    read_until(program, "decode up", "prefill up")
    program.send_signal(signal.SIGINT)
    lines = read_until(program, "prefill gone")
    told = [line for line in lines if not line.startswith("disagg:")]
    assert told == ["decode asked 1", "decode gone", "prefill asked 1", "prefill gone"]
    assert program.wait(5) == 0


def test_a_second_signal_ends_the_streams_of_both() -> None:
    program = started(decode=(60, 0), prefill=(60, 0))
    read_until(program, "decode up", "prefill up")
    program.send_signal(signal.SIGINT)
    read_until(program, "decode asked 1")
    program.send_signal(signal.SIGINT)
    assert "prefill asked 2" in read_until(program, "decode asked 2", "prefill gone")
    assert program.wait(5) == 0


@pytest.mark.parametrize("name", disagg.NODES)
def test_when_a_node_ends_by_itself_the_other_is_drained_and_the_whole_fails(name: str) -> None:
    dials = {"decode": (0.2, 0), "prefill": (0.2, 0), name: (0.2, 7)}
    program = started(**dials)
    other = next(other for other in disagg.NODES if other != name)
    lines = read_until(program, f"{other} gone")
    assert f"disagg: {name} ended by itself (exit status 7); stopping the other" in lines
    assert program.wait(5) == 1


def test_when_the_program_is_killed_the_nodes_are_asked_to_stop() -> None:
    program = started(decode=(0.1, 0), prefill=(0.1, 0))
    read_until(program, "decode up", "prefill up")
    children = subprocess.run(["pgrep", "-P", str(program.pid)], capture_output=True, text=True, check=True).stdout.split()
    program.kill()
    program.wait(5)
    end = time.monotonic() + 5
    while time.monotonic() < end and any(os.path.exists(f"/proc/{pid}") for pid in children):
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)


def test_the_command_lines() -> None:
    environ = {"PREFILL_ARGS": "--base-gpu-id 1"}
    decode = disagg.command("decode", ["/m", "--tp-size", "2"], environ)
    prefill = disagg.command("prefill", ["/m", "--tp-size", "2"], environ)
    assert " ".join(decode[4:]) == "/m --name decode --system-port 0 --frontend --disaggregation-mode decode --tp-size 2"
    told = "/m --name prefill --system-port 0 --no-frontend --disaggregation-mode prefill --tp-size 2 --base-gpu-id 1"
    assert " ".join(prefill[4:]) == told


def test_both_nodes_get_one_store_which_goes_with_the_program(tmp_path: Path) -> None:
    with disagg.discovery({}) as environ:
        store = Path(environ["DYN_FILE_KV"])
        assert store.is_dir()
    assert not store.exists()
    with disagg.discovery({"DYN_FILE_KV": str(tmp_path)}) as environ:
        assert environ["DYN_FILE_KV"] == str(tmp_path)


def test_without_a_model_it_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert disagg.main([]) == 2
    assert disagg.main(["--help"]) == 0
    assert "MODEL" in capsys.readouterr().err
