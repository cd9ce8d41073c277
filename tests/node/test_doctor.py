"""`sgnode doctor` on a node that runs: nothing wrong, a process that is stopped, one that was killed, a node that is gone."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.harness import SGNODE, Node, marked_pids, send, wait_for

Make = Callable[..., Node]
Row = dict[str, str]


def doctor(node: Node) -> tuple[int, list[Row]]:
    done = node.sgnode("doctor", "--json")
    assert not done.stderr
    found: list[Row] = json.loads(done.stdout)
    return done.returncode, found


def errors(rows: list[Row]) -> list[str]:
    return [f"{each['check']}: {each['found']}" for each in rows if each["level"] == "error"]


def test_a_running_node(make_node: Make) -> None:
    node = make_node("--agents", "2").start().wait_ready(40)
    files = {path for path in node.runtime_dir.rglob("*") if "log" not in path.parts}
    code, rows = doctor(node)
    assert code == 0 and errors(rows) == []
    fine = [f"{each['check']}: {each['found']}" for each in rows if each["level"] == "ok"]
    status = node.status()
    for row in status["processes"]:
        assert any(each.startswith(f"{row['name']}: ready, pid {row['pid']}") for each in fine), (row["name"], fine)
    for port in status["ports"].values():
        assert any(re.match(rf"port: --\S+ {port}: pid \d+ of this node", each) for each in fine), fine
    assert "discovery: the records of 2 agents are there" in fine
    assert {path for path in node.runtime_dir.rglob("*") if "log" not in path.parts} == files, "it leaves nothing"

    relay, agent = node.pid("relay"), node.pid("agent:0")
    send(relay, signal.SIGSTOP)
    code, rows = doctor(node)
    send(relay, signal.SIGCONT)
    assert code == 4 and f"relay: pid {relay} is stopped (SIGSTOP)" in errors(rows)

    send(agent, signal.SIGKILL)
    wait_for("another agent:0", lambda: node.pid("agent:0") not in (0, agent) and node.status()["state"] == "ready", 20)
    code, rows = doctor(node)
    assert code == 0, errors(rows)
    assert {"agent:0: restarted once"} == {
        f"{each['check']}: {each['found']}" for each in rows if each["level"] == "warning" and "restarted" in each["found"]
    }

    assert node.process is not None
    send(node.process.pid, signal.SIGKILL)
    wait_for("no process left", lambda: not marked_pids(node.runtime_dir), 5)
    code, rows = doctor(node)
    assert code == 4 and errors(rows) == [f"node: no node is running in {node.runtime_dir}"]


def test_before_a_start_with_sglangs_own_parser(model: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [SGNODE, "doctor", str(model), "--tp-size", "1", "--runtime-dir", str(tmp_path / "run"), "--json"]
    command += [
        "--http-port",
        "0",
        "--system-port",
        "0",
        "--kv-events-config",
        '{"publisher": "zmq", "endpoint": "tcp://*:15557"}',
    ]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(temporary)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    rows = json.loads(done.stdout)
    assert done.returncode == 0, errors(rows)
    found = [f"{each['check']}: {each['found']}" for each in rows]
    assert any("1 safetensors files" in each for each in found)
    assert "port: --kv-events-config endpoint 15557 on 0.0.0.0 is free" in found
    assert list(temporary.iterdir()) == [] and not (tmp_path / "run").exists(), "it leaves nothing"
