"""Deaths of an engine in a row: restarts with back-off, a bundle of each, a crash loop, and what can't be killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.harness import Node, gone, instances, process_state, send, wait_for
from tests.node.conftest import MODEL
from tests.streams import FOREVER, Streams

Make = Callable[..., Node]

TRACER = """
import ctypes, signal, sys
seized = ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), None, None)
assert seized == 0, "PTRACE_SEIZE"
print("traced", flush=True)
signal.pause()
"""
"""Whom it traces stays a zombie after its death: nobody but the tracer can reap it."""


def kill_engine(node: Node) -> int:
    """SIGKILL the engine, proven; its pid."""
    pid = node.pid("engine")
    send(pid, signal.SIGKILL)
    wait_for("its death is known", lambda: len(node.status().get("deaths", [])) > 0, 10)
    return pid


def card(node: Node) -> tuple[Path, bytes]:
    (found,) = [path for path in (node.runtime_dir / "discovery/v1/mdc").rglob("*") if path.is_file()]
    return found, found.read_bytes()


def test_crashes_are_restarted_with_back_off_until_they_are_a_loop(make_node: Make, streams: Streams) -> None:
    node = make_node().start().wait_ready(40)
    results = streams.start(node.url, MODEL, 4, FOREVER)
    streams.flowing(results)
    (record,), old_card = instances(node), card(node)

    # The first: at once, everything as before, and a bundle.
    kill_engine(node)
    streams.join(10)
    assert all(r.error and not r.finish for r in results), results
    wait_for("second life", lambda: node.status().get("incarnation") == 2, 20)
    status = node.wait_ready(20).status()
    assert instances(node) == [record] and card(node) == old_card, "the same worker, the same model"
    assert "at once" in (node.runtime_dir / "log/coordinator.log").read_text()
    crash = status["last_crash"]
    bundle = Path(crash["path"])
    assert "SIGKILL" in crash["reason"] and crash["incarnation"] == 1 and bundle.parent == node.runtime_dir / "log"
    told = json.loads((bundle / "crash.json").read_text())
    assert told["reason"] == crash["reason"] and {"sgnode", "sglang", "ai-dynamo"} <= told["versions"].keys()
    assert "is dead" in (bundle / "engine.log").read_text() and "MemTotal" in (bundle / "host.txt").read_text()
    assert json.loads((bundle / "status.json").read_text())["name"] == node.name
    assert "last crash" in node.sgnode("status").stdout and str(bundle) in node.sgnode("status").stdout

    # More of them: each start later than the one before. A new coordinator counts on.
    for number in (2, 3, 4):
        kill_engine(node)
        wait_for("counted", lambda number=number: len(node.status().get("deaths", [])) == number, 10)
        status = node.status()
        if number == 4:
            assert 2 < status["restart_at"] - status["deaths"][-1] <= 4.1, status
            assert not instances(node) and status["last_log"], status
            old = node.pid("coordinator")
            send(old, signal.SIGKILL)
            wait_for("a new coordinator", lambda old=old: node.pid("coordinator") not in (0, old), 10)
            wait_for("it has reported", lambda: node.process_row("coordinator").get("state") == "ready", 10)
            assert len(node.status()["deaths"]) == 4, node.status()
        wait_for("the next life", lambda number=number: node.status().get("incarnation") == number + 1, 20)
        node.wait_ready(20)

    # One too many.
    kill_engine(node)
    wait_for("given up", lambda: node.status().get("state") == "failed", 10)
    status = node.status()
    assert "crash loop" in status["reason"] and "SIGKILL" in status["reason"] and "sgnode restart engine" in status["waiting_for"]
    assert any("SIGKILL" in line for line in status["last_log"]), status["last_log"]
    assert not instances(node) and node.process is not None and node.process.poll() is None
    assert "| " in node.sgnode("status").stdout
    bundles = sorted((node.runtime_dir / "log").glob("crash-*"))
    assert len(bundles) == 5

    # A coordinator's death doesn't start it again; a person does.
    old = node.pid("coordinator")
    send(old, signal.SIGKILL)
    wait_for("a new coordinator", lambda: node.pid("coordinator") not in (0, old), 10)
    wait_for("it has reported", lambda: node.process_row("coordinator").get("state") == "ready", 10)
    assert node.status()["state"] == "failed" and node.pid("engine") == 0
    done = node.sgnode("restart", "engine")
    assert done.returncode == 0, done.stderr
    status = node.wait_ready(20).status()
    assert (status["incarnation"], status["deaths"], status["last_log"]) == (6, [], [])
    assert instances(node) == [record]


def test_a_process_that_is_killed_and_not_gone_is_a_failure_until_it_is(make_node: Make) -> None:
    node = make_node().start().wait_ready(40)
    engine = node.pid("engine")
    child = int(Path(f"/proc/{engine}/task/{engine}/children").read_text().split()[0])
    tracer = subprocess.Popen([sys.executable, "-c", TRACER, str(child)], stdout=subprocess.PIPE, text=True)
    try:
        assert tracer.stdout is not None and tracer.stdout.readline() == "traced\n"
        send(tracer.pid, signal.SIGSTOP)
        os.kill(child, signal.SIGKILL)
        wait_for("engine dead", lambda: gone(engine), 10)
        wait_for("failed", lambda: node.status().get("state") == "failed", 40, every=0.2)
        assert process_state(child) == "Z"
        status = node.status()
        assert str(child) in status["reason"] and "not gone" in status["reason"], status
        assert status["incarnation"] == 1 and not instances(node)
    finally:
        tracer.kill()
        tracer.wait(10)
    wait_for("started again by itself", lambda: node.status().get("incarnation") == 2, 20)
    node.wait_ready(20)


def test_an_engine_that_cannot_load_says_why_in_the_status(make_node: Make) -> None:
    node = make_node(dials="step_seconds=0.01,fault=load").start()

    def failed() -> Any:
        status = node.status()
        return status if status.get("last_log") else None

    status = wait_for("the log's end", failed, 40)
    assert any("synthetic fault: load" in line for line in status["last_log"]), status["last_log"]
    assert status["state"] in ("starting", "loading", "failed")
