"""The process tree with a synthetic engine: order, deaths, stop, two nodes side by side. Real signals, real supervisord."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.harness import Node, gone, marked_pids, wait_for
from tests.node.conftest import MODEL

Make = Callable[..., Node]


def complete(node: Node, tokens: int = 20) -> int:
    body = {"model": MODEL, "prompt": [20, 30, 40], "max_tokens": tokens, "ignore_eos": True}
    answer = requests.post(f"{node.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["completion_tokens"])


def timeline(node: Node) -> dict[str, Any]:
    """The start-up that status shows, once all of it was heard: an engine may be ready before its keeper's second beat."""
    wait_for("all phases", lambda: {"keeper", "registered"} <= node.status()["startup"]["phases"].keys(), 5)
    found: dict[str, Any] = node.status()["startup"]
    return found


def files_left(node: Node) -> list[Path]:
    everything = [p.relative_to(node.runtime_dir) for p in node.runtime_dir.rglob("*") if not p.is_dir()]
    return [path for path in everything if path.parts[0] != "log"]


def test_a_node_starts_serves_and_stops_without_a_trace(make_node: Make) -> None:
    node = make_node().start().wait_ready(40)
    assert complete(node) == 20
    startup, table = timeline(node), node.sgnode("status")
    assert table.returncode == 0 and "agent:0" in table.stdout and "ready" in table.stdout
    assert list(startup["phases"]) == ["check", "processes", "keeper", "load", "warm_up", "registered"]
    assert startup["done"] and startup["current"] is None and f"start-up: {startup['seconds']:.1f} s = check" in table.stdout
    assert "agent:0" in node.sgnode("ctl", "status").stdout
    stopped = node.sgnode("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert node.wait_stopped(20) == 0
    wait_for("no process left", lambda: not marked_pids(node.runtime_dir), 5)
    assert files_left(node) == []
    assert node.sgnode("status").returncode == 3


def test_sigterm_while_loading_stops_at_once(make_node: Make) -> None:
    node = make_node(dials="load_seconds=60").start()
    wait_for("loading", lambda: node.status().get("state") == "loading", 20)
    table = node.sgnode("status")
    assert table.returncode == 4 and " s so far = check" in table.stdout
    assert node.status()["startup"]["current"] == "load" and ", load for " in table.stdout
    asked = time.monotonic()
    node.terminate()
    assert node.wait_stopped(15) == 0
    assert time.monotonic() - asked < 5
    wait_for("no process left", lambda: not marked_pids(node.runtime_dir), 5)
    assert files_left(node) == []


def test_live_while_loading_and_not_ready(make_node: Make) -> None:
    node = make_node(dials="load_seconds=60").start()
    wait_for("loading", lambda: node.status().get("state") == "loading", 20)
    url = node.system_url
    wait_for("prober answers", lambda: _code(url + "/live") == 200, 10)
    assert (_code(url + "/health"), _code(url + "/ready")) == (503, 503)


def _code(url: str) -> int:
    try:
        return requests.get(url, timeout=2).status_code
    except requests.ConnectionError:
        return 0


def test_a_dead_scheduler_ends_the_engine_and_the_node_comes_back(make_node: Make) -> None:
    node = make_node().start().wait_ready(40)
    engine = node.pid("engine")
    child = next(c for c in psutil.Process(engine).children() if "sgnode::child" in " ".join(c.cmdline()))
    tree = [engine, *[c.pid for c in psutil.Process(engine).children(recursive=True)]]
    os.kill(child.pid, signal.SIGKILL)
    wait_for("the whole engine gone", lambda: all(gone(pid) for pid in tree), 5)
    wait_for("second incarnation", lambda: node.status().get("incarnation") == 2, 30)
    node.wait_ready(40)
    assert complete(node) == 20
    assert node.process_row("agent:0")["restarts"] == 0
    startup = timeline(node)
    assert startup["incarnation"] == 2 and list(startup["phases"]) == ["keeper", "load", "warm_up", "registered"]


def test_side_processes_die_and_return_without_the_engine_noticing(make_node: Make) -> None:
    node = make_node().start().wait_ready(40)
    engine, startup = node.pid("engine"), timeline(node)
    for name in ("relay", "prober", "coordinator", "agent:0"):
        old = node.pid(name)
        os.kill(old, signal.SIGKILL)
        wait_for(f"{name} dead", lambda old=old: gone(old), 5)
        wait_for(f"{name} back", lambda name=name, old=old: node.pid(name) not in (0, old), 10)
        node.wait_ready(40)
        assert node.pid("engine") == engine
    wait_for("serving again", lambda: _serves(node), 20)
    assert node.status()["startup"] == startup, "a new coordinator goes on with it"


def _serves(node: Node) -> bool:
    body = {"model": MODEL, "prompt": [20, 30, 40], "max_tokens": 5, "ignore_eos": True}
    return requests.post(f"{node.url}/v1/completions", json=body, timeout=30).status_code == 200


def test_two_nodes_of_one_machine_do_not_collide(make_node: Make) -> None:
    first, second = make_node(name="a").start(), make_node(name="b").start()
    first.wait_ready(60)
    second.wait_ready(60)
    assert first.status()["ports"] != second.status()["ports"]
    assert complete(first) == complete(second) == 20
    first.terminate()
    assert first.wait_stopped(30) == 0
    second.wait_ready(20)  # on a host under load a beat may be late, and the node out of discovery for a moment
    assert complete(second) == 20
    assert second.status()["incarnation"] == 1


def test_supervisorctl_understands_agent(make_node: Make) -> None:
    node = make_node("--agents", "2", "--drain-grace", "0.5").start().wait_ready(40)
    before = {name: node.pid(name) for name in ("agent:0", "agent:1", "engine")}
    assert min(before.values()) > 0
    done = node.sgnode("ctl", "restart", "agent")
    assert "no such process" not in done.stdout + done.stderr
    node.wait_ready(40)
    after = {name: node.pid(name) for name in before}
    assert after["engine"] == before["engine"]
    assert after["agent:0"] != before["agent:0"] and after["agent:1"] != before["agent:1"]


def test_a_program_gets_only_its_part_of_the_environment(make_node: Make) -> None:
    node = make_node()
    node.environment.update({"ETCD_AUTH_PASSWORD": "s3cret", "HF_TOKEN": "t0ken", "UNRELATED_SECRET": "x"})
    node.start().wait_ready(40)

    def environment(name: str) -> bytes:
        return Path(f"/proc/{node.pid(name)}/environ").read_bytes()

    assert b"s3cret" in environment("agent:0") and b"t0ken" not in environment("agent:0")
    assert b"t0ken" in environment("engine") and b"s3cret" not in environment("engine")
    for name in ("relay", "prober"):
        assert b"s3cret" not in environment(name) and b"t0ken" not in environment(name)
    everything = b"".join(Path(f"/proc/{pid}/environ").read_bytes() for pid in marked_pids(node.runtime_dir))
    assert b"UNRELATED_SECRET" not in everything
    shown = node.sgnode("show-config").stdout
    assert json.loads(shown)["name"] == "test" and "s3cret" not in shown and "t0ken" not in shown
