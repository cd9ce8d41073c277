"""Drain, resume, restart, stop: what runs is not lost, what can't be saved ends with the error that a frontend migrates."""

import os
import signal
import subprocess
import time
import xmlrpc.client
from collections.abc import Callable

import pytest

from shared import supervisord
from tests.harness import Node, gone, instances, marked_pids, nothing_left, running, wait_for
from tests.node.conftest import MODEL
from tests.streams import FOREVER, Streams

Make = Callable[..., Node]
Rounds = Callable[[int], int]


# --- drain and resume ------------------------------------------------------------------------------------------------


def test_drain_finishes_streams_keeps_the_engine_and_survives_the_coordinator(make_node: Make, streams: Streams) -> None:
    node = make_node("--drain-grace", "1").start().wait_ready(40)
    engine, url = node.pid("engine"), node.url
    results = streams.start(url, MODEL, 8, 400)
    streams.flowing(results)
    asked = time.monotonic()
    assert node.sgnode("drain", "--no-wait").returncode == 0
    wait_for("withdrawn", lambda: not instances(node), 5, every=0.002)
    assert time.monotonic() - asked < 2, "the command itself takes most of it"
    reason = wait_for("progress", lambda: node.status().get("reason", "").startswith("draining: 8 streams left"), 5)
    assert reason and node.sgnode("status").returncode == 4
    # Neither the coordinator's death nor an agent's brings a draining node back into discovery.
    for name in ("coordinator", "agent:0"):
        if name == "agent:0":
            streams.join()  # its own streams would die with it
            wait_for("drained", lambda: node.status().get("state") == "drained", 10)
        old = node.pid(name)
        os.kill(old, signal.SIGKILL)
        wait_for(f"{name} dead", lambda old=old: gone(old), 5)
        wait_for(f"{name} back", lambda name=name, old=old: node.pid(name) not in (0, old), 10)
    wait_for("drained again", lambda: node.status().get("state") == "drained", 10)
    assert all(r.complete and r.tokens == 400 for r in results), results
    status = node.status()
    assert not status["registered"] and status["want"] == "drain" and "sgnode drain" in status["reason"]
    assert node.pid("engine") == engine
    refused = streams.start(url, MODEL, 1, 5)[0]
    streams.join()
    assert refused.status in (404, 503), refused
    assert node.sgnode("resume").returncode == 0
    node.wait_ready(20)
    again = streams.start(url, MODEL, 4, 50)
    streams.join()
    assert all(r.complete for r in again), again
    assert node.pid("engine") == engine


def test_resume_in_mid_drain_goes_on_as_if_nothing_was(make_node: Make, streams: Streams) -> None:
    node = make_node().start().wait_ready(40)
    results = streams.start(node.url, MODEL, 4, 600)
    streams.flowing(results)
    node.sgnode("drain", "--no-wait")
    wait_for("withdrawn", lambda: not instances(node), 5)
    node.sgnode("ctl", "resume")
    node.wait_ready(20)
    streams.join()
    assert all(r.complete and r.tokens == 600 for r in results), results


# --- deadlines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deadline", "second SIGTERM", "stop --now", "drain --now"])
def test_streams_that_never_end_get_the_migratable_error_when_time_is_up(make_node: Make, streams: Streams, how: str) -> None:
    deadline = 3.0 if how == "deadline" else 200.0
    node = make_node("--drain-grace", "0.5", "--drain-timeout", str(deadline)).start().wait_ready(40)
    results = streams.start(node.url, MODEL, 8, FOREVER)
    streams.flowing(results)
    running(node, 8)
    if how == "drain --now":
        asked, expected = time.monotonic(), 0.5
        assert node.sgnode("drain", "--now").returncode == 0
    elif how == "stop --now":
        asked, expected = time.monotonic(), 0.5
        assert node.sgnode("stop", "--now").returncode == 0
    else:
        node.terminate()
        asked, expected = time.monotonic(), deadline
        if how != "deadline":
            wait_for("draining", lambda: node.status().get("state") == "draining", 10)
            node.terminate()
            asked, expected = time.monotonic(), 0.0
    streams.join(30)
    late = [r.ended - asked - expected for r in results]
    assert max(map(abs, late)) < 1.0, late
    assert all(r.error and not r.finish for r in results), results[0]
    if how == "drain --now":
        assert node.status()["state"] == "drained"
        node.terminate()
    assert node.wait_stopped(20) == 0
    nothing_left(node)


# --- what would cut streams ------------------------------------------------------------------------------------------


def test_stop_all_is_refused_also_to_a_stock_supervisorctl(make_node: Make, streams: Streams) -> None:
    node = make_node().start().wait_ready(40)
    results = streams.start(node.url, MODEL, 4, 300)
    streams.flowing(results)
    for method, arguments in (("stopAllProcesses", ()), ("stopProcess", ("engine",)), ("stopProcessGroup", ("engine",))):
        with pytest.raises(xmlrpc.client.Fault, match="sgnode"):
            supervisord.call(node.runtime_dir, f"supervisor.{method}", *arguments)
    stock = ["-s", f"unix://{node.runtime_dir}/supervisor.sock", "stop", "all"]
    done = subprocess.run([node.tool("supervisorctl"), *stock], capture_output=True, text=True, timeout=30, check=False)
    assert "sgnode stop" in done.stdout + done.stderr
    streams.join()
    assert all(r.complete for r in results), results


def test_sigterm_to_the_whole_process_group_is_an_ordinary_stop(make_node: Make, streams: Streams) -> None:
    node = make_node().start(group=True).wait_ready(40)
    results = streams.start(node.url, MODEL, 8, 300)
    streams.flowing(results)
    assert node.process is not None
    os.killpg(node.process.pid, signal.SIGTERM)
    streams.join()
    assert all(r.complete and r.tokens == 300 for r in results), results
    assert node.wait_stopped(30) == 0
    nothing_left(node)


# --- restarts --------------------------------------------------------------------------------------------------------


def test_agents_restart_one_after_the_other_without_losing_a_stream(make_node: Make, streams: Streams) -> None:
    node = make_node("--agents", "2", "--drain-grace", "1").start().wait_ready(40)
    wait_for("both agents", lambda: len(instances(node)) == 2, 20)
    before = {name: node.pid(name) for name in ("agent:0", "agent:1", "engine", "frontend")}
    url = node.url
    long = streams.start(url, MODEL, 16, 300)
    streams.flowing(long)
    restarting = subprocess.Popen(node.sgnode_command("restart", "agent"), stdout=subprocess.PIPE, text=True)
    sent = 0
    while restarting.poll() is None:
        streams.start(url, MODEL, 1, 20)
        sent += 1
        time.sleep(0.1)
    assert restarting.returncode == 0 and sent > 10
    streams.join()
    bad = [r for r in streams.results if not r.complete]
    assert not bad, (len(bad), sent, bad[0])
    after = {name: node.pid(name) for name in before}
    assert {name for name in before if after[name] != before[name]} == {"agent:0", "agent:1"}


def test_restart_engine_drains_first_and_serves_again(make_node: Make, streams: Streams) -> None:
    node = make_node("--drain-grace", "0.5").start().wait_ready(40)
    worker, engine = node.process_row("agent:0")["detail"], node.pid("engine")
    results = streams.start(node.url, MODEL, 4, 200)
    streams.flowing(results)
    done = node.sgnode("restart", "engine")
    assert done.returncode == 0, done.stderr
    streams.join()
    assert all(r.complete and r.tokens == 200 for r in results), results
    status = node.status()
    assert status["state"] == "ready" and status["incarnation"] == 2 and node.pid("engine") != engine
    assert node.process_row("agent:0")["detail"] == worker, "the same worker id"


def test_restart_of_what_is_not_there_is_one_line(make_node: Make) -> None:
    node = make_node("--no-frontend").start().wait_ready(40)
    for name in ("frontend", "nonsense", "agent:7"):
        done = node.sgnode("restart", name)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and name in done.stderr, done.stderr


# --- supervisord's own end -------------------------------------------------------------------------------------------


def test_nothing_outlives_a_killed_supervisord(make_node: Make, streams: Streams) -> None:
    node = make_node("--agents", "2").start().wait_ready(40)
    results = streams.start(node.url, MODEL, 4, FOREVER)
    streams.flowing(results)
    pids = marked_pids(node.runtime_dir)
    assert len(pids) > 9 and node.process is not None
    os.kill(node.process.pid, signal.SIGKILL)
    killed = time.monotonic()
    wait_for("everything dead", lambda: all(gone(pid) for pid in pids), 2, every=0.005)
    print(f"everything dead after {(time.monotonic() - killed) * 1e3:.0f} ms")
    node.process.wait(5)
    node.start().wait_ready(40)
    assert node.status()["state"] == "ready"


@pytest.mark.soak
def test_a_stop_under_load_loses_no_stream(make_node: Make, rounds: Rounds, figures: Callable[..., None]) -> None:
    node = make_node("--agents", "2", "--drain-grace", "1", dials="step_seconds=0.05")
    for number in range(rounds(20)):
        node.start().wait_ready(60)
        with Streams() as streams:
            results = streams.start(node.url, MODEL, 256, 120)
            streams.flowing(results, 60)
            asked = time.monotonic()
            node.terminate()
            wait_for("withdrawn", lambda: not instances(node), 5, every=0.002)
            withdrawn = time.monotonic() - asked
            streams.join()
            lost = [r for r in results if not (r.complete and r.tokens == 120)]
        assert node.wait_stopped(30) == 0
        figures(round=number, streams=len(results), lost=len(lost), withdrawn_ms=round(withdrawn * 1e3, 1))
        assert not lost, lost[0]
        nothing_left(node)
