"""A model over several nodes, with synthetic engines: rank gate, epochs, drains, deaths, refusals. Real supervisord on each."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.frontend import Frontend
from tests.groups import Group
from tests.harness import Node, gone, instances, marked_pids, nothing_left, process_state, running, send, wait_for
from tests.streams import FOREVER, Result, Streams

MODEL = "synthetic"
DEADLINE = 2.0
"""Seconds without a sign of life that end an epoch: the default."""
MakeGroup = Callable[..., Group]


@pytest.fixture
def make_group(model: Path) -> Iterator[MakeGroup]:
    """Makes groups; all of their nodes are ended afterwards."""
    groups: list[Group] = []

    def make(nnodes: int = 2, *arguments: str, **more: Any) -> Group:
        groups.append(Group(model, nnodes, *arguments, name=MODEL, **more))
        return groups[-1]

    yield make
    for group in groups:
        group.close()


@pytest.fixture(scope="module")
def shared(model: Path) -> Iterator[Group]:
    """One group for tests that leave it ready."""
    group = Group(model, 2, "--drain-grace", "0.5")
    try:
        yield group.start().wait_ready()
    finally:
        group.close()


def waiting(node: Node) -> str:
    """What a node says that it waits for, if it does."""
    status = node.status()
    return str(status.get("waiting_for", "")) if status.get("state") == "waiting" else ""


def ask(node: Node, tokens: int) -> requests.Response:
    body = {"model": MODEL, "prompt": [20, 30, 40], "max_tokens": tokens, "ignore_eos": True}
    return requests.post(f"{node.url}/v1/completions", json=body, timeout=60)


def serves(node: Node, tokens: int = 20) -> None:
    answer = ask(node, tokens)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == tokens, answer.text


def lost(results: list[Result]) -> list[Result]:
    return [r for r in results if not r.complete]


# --- rank gate ---


def test_ranks_may_start_in_any_order_and_each_says_what_it_waits_for(make_group: MakeGroup) -> None:
    group = make_group(4)
    group.nodes[3].start()
    wait_for("rank 3 waits for the leader", lambda: "rank 0 of 4" in waiting(group.nodes[3]), 20)
    group.leader.start()
    wait_for("the leader waits", lambda: waiting(group.leader).startswith("ranks 1, 2 of 4 not seen, "), 20)
    group.nodes[1].start()
    seconds = wait_for("both wait for rank 2", lambda: waiting(group.leader).startswith("rank 2 of 4 not seen, "), 20)
    assert seconds
    wait_for("rank 3 knows it from the leader", lambda: waiting(group.nodes[3]).startswith("rank 2 of 4 not seen, "), 5)
    assert not any(group.engines())
    assert group.leader.sgnode("status").returncode == 4
    group.nodes[2].start()
    group.wait_ready()
    assert group.epoch == 1 and all(group.engines())
    serves(group.leader)


def test_a_follower_runs_what_its_rank_has_and_says_why(shared: Group) -> None:
    follower = shared.nodes[1]
    names = [row["name"] for row in follower.status()["processes"]]
    assert names == ["coordinator", "relay", "keeper", "engine", "prober"]
    table = follower.sgnode("ctl", "node")
    assert "rank 1 of 2: no agent and no frontend here, rank 0 has them" in table.stdout
    by_hand = subprocess.run(
        [sys.executable, "-m", "procs.agent", "0"],
        env={**follower.environment, "SGNODE_RUNTIME_DIR": str(follower.runtime_dir)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert by_hand.returncode == 2 and by_hand.stderr == "agent: agents run on node_rank 0 only; this is rank 1 of 2\n"
    for name, node in (("agent", follower), ("agent:0", follower), ("frontend", follower), ("engine", follower)):
        done = node.sgnode("ctl", "start", name)
        assert done.returncode and "refused" in done.stdout and "Traceback" not in done.stdout + done.stderr, done
        assert "Type" in done.stdout and len(done.stdout.strip().splitlines()) == 1, done.stdout
    for node in shared.nodes:
        done = node.sgnode("ctl", "stop", "engine")
        assert "start and stop together" in done.stdout + done.stderr
    restart = follower.sgnode("restart", "engine")
    assert restart.returncode == 2 and "on rank 0" in restart.stderr
    for path in ("/live", "/ready", "/health"):
        assert requests.get(follower.system_url + path, timeout=5).status_code == 200
    metrics = requests.get(follower.system_url + "/metrics", timeout=5).text
    assert (
        f"sgnode_epoch {float(shared.epoch)}" in metrics and 'sgnode_process_state{process="engine",state="ready"} 1.0' in metrics
    )
    assert 'sgnode_node_state{state="ready"} 1.0' in metrics and 'node_rank="1"' in metrics
    assert 'sgnode_process_open_fds{process="engine"}' in metrics and 'sgnode_process_restarts_total{process="keeper"}' in metrics
    assert 'success{collector="agent' not in metrics and metrics.count("sgnode_scrape_collector_success{") == 4
    assert shared.epoch == follower.status()["epoch"]


# --- deaths ---


def victims(group: Group, who: str) -> list[int]:
    """Pids of the same part on each rank."""
    if who == "child":
        return [psutil.Process(pid).children()[0].pid for pid in group.engines()]
    return [node.pid(who) for node in group.nodes]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("who", ["child", "engine", "keeper"])
def test_a_death_ends_the_epoch_on_every_rank_and_the_next_one_begins(
    shared: Group, streams: Streams, figures: Callable[..., None], who: str, rank: int
) -> None:
    shared.wait_ready()
    shared.leader.sgnode("restart", "engine")  # an earlier test's deaths shall not count here
    shared.wait_ready()
    epoch, engines = shared.epoch, shared.engines()
    trees = [child.pid for pid in engines for child in psutil.Process(pid).children(recursive=True)] + engines
    results = streams.start(shared.leader.url, MODEL, 16, FOREVER)
    streams.flowing(results)
    began = time.monotonic()
    send(victims(shared, who)[rank], signal.SIGKILL)
    streams.join()
    ends = [r.ended - began for r in results]
    wait_for("both engines gone", lambda: all(gone(pid) for pid in trees), DEADLINE + 0.5)
    cleared = time.monotonic() - began
    wait_for("next epoch", lambda: shared.epoch > epoch, 20)
    shared.wait_ready(30)
    ready = time.monotonic() - began
    figures(who=who, rank=rank, stream_end_ms=round(max(ends) * 1e3), gone_ms=round(cleared * 1e3), ready_s=round(ready, 2))
    assert all("503" in r.error or "service_unavailable" in r.error for r in results), results[0]
    assert max(ends) < DEADLINE + 0.5
    assert shared.epoch == epoch + 1 and not set(engines) & set(shared.engines())
    serves(shared.leader)


def test_a_node_that_vanishes_ends_the_epoch_within_the_deadline(
    make_group: MakeGroup, streams: Streams, figures: Callable[..., None]
) -> None:
    group = make_group(3, "--drain-grace", "0.5").start().wait_ready()
    vanished, other = group.nodes[1], group.nodes[2]
    results = streams.start(group.leader.url, MODEL, 8, FOREVER)
    streams.flowing(results)
    before = group.engines()
    began = time.monotonic()
    assert vanished.process is not None
    vanished.process.kill()
    streams.join()
    ended = time.monotonic() - began
    wait_for("every engine gone", lambda: all(gone(pid) for pid in before), DEADLINE + 1)
    figures(stream_end_ms=round(ended * 1e3))
    assert ended < DEADLINE + 0.5
    wait_for("the leader waits for it", lambda: waiting(group.leader).startswith("rank 1 of 3 not seen, "), 10)
    wait_for("so does rank 2", lambda: waiting(other).startswith("rank 1 of 3 not seen, "), 10)
    vanished.start()
    group.wait_ready()
    serves(group.leader)
    # The leader vanishes: nobody waits for it with an engine.
    before = group.engines()
    assert group.leader.process is not None
    group.leader.process.kill()
    wait_for("every engine gone", lambda: all(gone(pid) for pid in before), DEADLINE + 1)
    wait_for("rank 1 waits", lambda: waiting(vanished).startswith("rank 0 of 3 (the leader, "), 10)
    group.leader.start()
    group.wait_ready()
    serves(group.leader)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_coordinator_rejoins_the_running_epoch(shared: Group, streams: Streams, rank: int) -> None:
    shared.wait_ready()
    epoch, engines = shared.epoch, shared.engines()
    results = streams.start(shared.leader.url, MODEL, 16, 600)
    streams.flowing(results)
    node = shared.nodes[rank]
    for end in (signal.SIGKILL, signal.SIGTERM):
        old = node.pid("coordinator")
        if end == signal.SIGKILL:
            send(old, end)
        else:
            assert node.sgnode("restart", "coordinator").returncode == 0
        wait_for("a new coordinator", lambda old=old: node.pid("coordinator") not in (0, old), 10)
        wait_for("its word", lambda: node.process_row("coordinator").get("state") == "ready", 10)
    streams.join()
    assert not lost(results)
    # Past the deadline nobody has ended anything.
    since = time.monotonic()
    wait_for("the deadline", lambda: time.monotonic() - since > DEADLINE + 0.5, 10)
    assert (shared.epoch, shared.engines()) == (epoch, engines)
    shared.wait_ready()
    assert shared.nodes[1].status()["epoch"] == epoch


def test_a_stopped_coordinator_ends_the_epoch_and_is_killed(make_group: MakeGroup) -> None:
    group = make_group().start().wait_ready()
    follower, engines = group.nodes[1], group.engines()
    send(stopped := follower.pid("coordinator"), signal.SIGSTOP)
    wait_for("the leader's engine gone", lambda: gone(engines[0]), DEADLINE + 1)
    wait_for("the leader waits", lambda: waiting(group.leader).startswith("rank 1 of 2 not seen"), 10)
    # Nobody starts an engine while the other's is left, and nobody waits for a person.
    assert not gone(engines[1]) and group.epoch == 1
    wait_for("supervisord kills it", lambda: gone(stopped), 30)
    group.wait_ready()
    assert group.epoch == 2 and gone(engines[1])


def test_five_deaths_are_a_crash_loop_of_the_whole_group(make_group: MakeGroup) -> None:
    group = make_group().start().wait_ready()
    for number in range(5):
        if number:
            wait_for("next epoch", lambda number=number: group.epoch == number + 1 and all(group.engines()), 30)
            group.wait_ready(30)
        send(victims(group, "child")[1], signal.SIGKILL)
    wait_for("failed", lambda: group.leader.status().get("state") == "failed", 20)
    assert "crash loop: 5 deaths" in group.leader.status()["reason"] and "rank 1 (" in group.leader.status()["reason"]
    wait_for("the follower knows", lambda: "crash loop" in waiting(group.nodes[1]), 10)
    assert list((group.nodes[1].runtime_dir / "log").glob("crash-*")), "the rank that died has a bundle"
    assert group.leader.sgnode("restart", "engine").returncode == 0
    group.wait_ready()
    serves(group.leader)


# --- drain, stop ---


def test_the_stop_of_a_follower_asks_the_leader_to_drain_first(make_group: MakeGroup, streams: Streams) -> None:
    group = make_group(2, "--drain-grace", "0.5").start().wait_ready()
    follower = group.nodes[1]
    results = streams.start(group.leader.url, MODEL, 32, 400)
    streams.flowing(results)
    running(group.leader, 32)
    follower.terminate()
    wait_for("the leader drains for it", lambda: group.leader.status()["state"] == "draining", 5)
    wait_for("withdrawn", lambda: not instances(group.leader), 5)
    wait_for("progress", lambda: "streams left" in str(follower.status().get("reason")), 5)
    streams.join()
    assert not lost(results) and all(r.tokens == 400 for r in results), lost(results)[:2]
    assert follower.wait_stopped(20) == 0
    nothing_left(follower)
    wait_for("the leader waits for it", lambda: waiting(group.leader).startswith("rank 1 of 2 not seen, "), 10)
    assert not group.leader.pid("engine") and not list((group.leader.runtime_dir / "log").glob("crash-*"))
    follower.start()
    group.wait_ready()
    serves(group.leader)


def test_the_stop_of_the_leader_drains_and_then_ends_the_followers_engines(make_group: MakeGroup, streams: Streams) -> None:
    group = make_group(2, "--drain-grace", "0.5").start().wait_ready()
    follower, engines = group.nodes[1], group.engines()
    results = streams.start(group.leader.url, MODEL, 32, 400)
    streams.flowing(results)
    group.leader.terminate()
    streams.join()
    assert not lost(results), lost(results)[:2]
    assert group.leader.wait_stopped(20) == 0
    nothing_left(group.leader)
    wait_for("the follower's engine gone", lambda: gone(engines[1]), 5)
    wait_for("it waits", lambda: waiting(follower).startswith(("rank 0 of 2", "the leader, which has stopped")), 10)
    assert not list((follower.runtime_dir / "log").glob("crash-*")), "an orderly end is no crash"
    # Without a leader a follower's stop waits for nobody.
    began = time.monotonic()
    follower.terminate()
    assert follower.wait_stopped(10) == 0 and time.monotonic() - began < 5
    nothing_left(follower)


def test_a_second_signal_to_a_follower_waits_for_nothing(make_group: MakeGroup, streams: Streams) -> None:
    group = make_group(2, "--drain-grace", "0.5").start().wait_ready()
    follower = group.nodes[1]
    results = streams.start(group.leader.url, MODEL, 8, FOREVER)
    streams.flowing(results)
    follower.terminate()
    wait_for("the leader drains", lambda: group.leader.status()["state"] == "draining", 5)
    began = time.monotonic()
    follower.terminate()
    assert follower.wait_stopped(10) == 0 and time.monotonic() - began < 5
    streams.join()
    assert all(r.error for r in results) and max(r.ended for r in results) - began < DEADLINE + 0.5
    nothing_left(follower)


def test_a_drain_by_any_rank_is_the_group_s(shared: Group, streams: Streams) -> None:
    shared.wait_ready()
    follower, engines = shared.nodes[1], shared.engines()
    results = streams.start(shared.leader.url, MODEL, 16, 200)
    streams.flowing(results)
    done = follower.sgnode("drain")
    assert done.returncode == 0, done.stderr
    assert shared.leader.status()["state"] == "drained" == follower.status()["state"]
    assert "rank 1" in shared.leader.status()["reason"]
    streams.join()
    assert not lost(results)
    # A coordinator that comes back does not let the group serve for a moment.
    send(shared.leader.pid("coordinator"), signal.SIGKILL)
    since = time.monotonic()
    while time.monotonic() - since < DEADLINE + 1:
        assert not instances(shared.leader)
        time.sleep(0.05)
    assert follower.sgnode("resume").returncode == 0
    shared.wait_ready()
    assert shared.engines() == engines
    serves(shared.leader)


def test_a_restart_of_the_engines_is_one_epoch_more(shared: Group, streams: Streams) -> None:
    shared.wait_ready()
    epoch, engines = shared.epoch, shared.engines()
    results = streams.start(shared.leader.url, MODEL, 8, 200)
    streams.flowing(results)
    done = shared.leader.sgnode("restart", "engine")
    assert done.returncode == 0, done.stderr
    assert not lost(streams.join())
    shared.wait_ready()
    assert shared.epoch == epoch + 1 and not set(engines) & set(shared.engines())


def test_a_stop_while_loading_stops_at_once(make_group: MakeGroup) -> None:
    group = make_group(2, dials="load_seconds=60").start()
    for node in group.nodes:
        wait_for("loading", lambda node=node: node.status().get("state") == "loading", 20)
    began = time.monotonic()
    group.nodes[1].terminate()
    assert group.nodes[1].wait_stopped(10) == 0 and time.monotonic() - began < 5
    began = time.monotonic()
    group.leader.terminate()
    assert group.leader.wait_stopped(10) == 0 and time.monotonic() - began < 5
    for node in group.nodes:
        nothing_left(node)


# --- refusals ---


def refused(node: Node) -> str:
    """The one line of a start that is refused."""
    done = subprocess.run(node.command(), env=node.environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and not marked_pids(node.runtime_dir), done.stderr
    return lines[0]


def test_a_second_leader_a_wrong_rank_and_a_missing_address_are_refused_at_start(shared: Group) -> None:
    assert "another leader" in refused(shared.extra_node(0, name="second"))
    assert "--node-rank 2: expected 0 to 1" in refused(shared.extra_node(2, name="third"))
    elsewhere = ("--dist-init-addr", "192.0.2.7:29500")
    assert "not an address of this machine; rank 0 runs where it points to" in refused(shared.extra_node(0, *elsewhere, name="b"))
    assert "--dist-init-addr: expected HOST:PORT" in refused(shared.extra_node(1, "--dist-init-addr", "host", name="c"))
    key = shared.extra_node(1, "--group-key-file", "/nowhere", name="d")
    assert "--group-key-file /nowhere" in refused(key)
    assert "--group-deadline" in refused(shared.extra_node(1, "--group-deadline", "0.2", name="e"))


def test_a_rank_that_is_taken_is_refused_and_costs_nobody_anything(shared: Group) -> None:
    shared.wait_ready()
    epoch = shared.epoch
    second = shared.extra_node(1, name="twin")
    second.start()
    wait_for("refused", lambda: waiting(second).startswith("rank 1 is r1@"), 20)
    assert "give one another --node-rank" in waiting(second)
    wait_for("said by the leader", lambda: "twin@" in shared.leader.sgnode("status").stdout, 5)
    assert shared.epoch == epoch and not second.pid("engine")
    second.terminate()
    assert second.wait_stopped(10) == 0
    shared.wait_ready()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--tp-size", "4"), "tp_size is 4, on the leader 2"),
        (("--served-model-name", "other"), "model is other, on the leader synthetic"),
    ],
)
def test_nodes_that_differ_do_not_start_and_say_in_what(make_group: MakeGroup, arguments: tuple[str, ...], line: str) -> None:
    group = make_group()
    different = group.extra_node(1, *arguments, name="r1")
    group.leader.start()
    different.start()
    wait_for("the leader says it", lambda: line in waiting(group.leader), 20)
    wait_for("so does the other", lambda: line in waiting(different), 5)
    assert any(line in text for text in group.leader.status()["group"]["differences"])
    assert f"rank 1 (r1@{os.uname().nodename}): {line}" in (group.leader.runtime_dir / "log/coordinator.log").read_text()
    assert not group.leader.pid("engine") and not different.pid("engine")


def test_clocks_that_differ_are_said(make_group: MakeGroup, tmp_path: Path) -> None:
    # The wall clock of one node's processes, as they read it: a machine has only one.
    (tmp_path / "sitecustomize.py").write_text("import time\ntrue = time.time\ntime.time = lambda: true() + 7\n")
    group = make_group()
    skewed = group.extra_node(1, name="r1", env={"PYTHONPATH": str(tmp_path)})
    group.leader.start()
    skewed.start()
    wait_for("the leader says it", lambda: "its clock is 7.0 s ahead of the leader's" in waiting(group.leader), 20)
    assert not group.leader.pid("engine")


def test_a_node_without_the_key_stays_outside(make_group: MakeGroup, tmp_path: Path) -> None:
    keys = [tmp_path / "group.key", tmp_path / "other.key"]
    for path in keys:
        made = subprocess.run(
            [Node.tool("sgnode"), "group-key", str(path)], capture_output=True, text=True, timeout=30, check=True
        )
        assert str(path) in made.stdout and path.stat().st_mode & 0o777 == 0o600
    group = make_group(3, "--group-key-file", str(keys[0]))
    other = group.extra_node(1, "--group-key-file", str(keys[1]), name="r1")
    group.leader.start()
    group.nodes[2].start()
    other.start()
    wait_for("the stranger is told", lambda: "it does not take this node's key" in waiting(other), 20)
    wait_for("the leader waits", lambda: waiting(group.leader).startswith("rank 1 of 3 not seen"), 20)
    log = group.leader.runtime_dir / "log/coordinator.log"
    line = "a node that has not the group's key was refused"
    wait_for("logged", lambda: line in log.read_text(), 5)
    wait_for("more attempts", lambda: float(waiting(other).split(" s: ")[0].rpartition(" ")[2]) > 3, 10)
    assert log.read_text().count(line) == 1
    other.terminate()
    assert other.wait_stopped(10) == 0
    group.nodes[1].start()
    group.wait_ready()
    serves(group.leader)
    # The secret is in no log, configuration or status.
    secret = keys[0].read_text().split('secret-key = "')[1].split('"')[0]
    texts = [path.read_text(errors="replace") for node in group.nodes for path in node.runtime_dir.glob("log/*.log")]
    assert not any(
        secret in text for text in [*texts, group.leader.sgnode("show-config").stdout, json.dumps(group.leader.status())]
    )


# --- many faults ---


@pytest.mark.soak
def test_random_kills_never_leave_two_epochs_or_a_hang(
    make_group: MakeGroup, rounds: Callable[[int], int], figures: Callable[..., None]
) -> None:
    group = make_group(3).start().wait_ready()
    chance = random.Random(4)
    done = threading.Event()
    mixed: list[Any] = []

    def watch() -> None:
        """No two engines of different epochs exist at one moment."""
        while not done.is_set():
            found = {}
            for node in group.nodes:
                for pid in marked_pids(node.runtime_dir):
                    epoch = _epoch_of(pid)
                    if epoch and process_state(pid) not in ("", "Z"):
                        found[pid] = epoch
            if len(set(found.values())) > 1 and all(process_state(pid) not in ("", "Z") for pid in found):
                mixed.append(found)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    took = []
    try:
        for _ in range(rounds(150)):
            group.leader.sgnode("restart", "engine")  # deaths that are meant shall not become a crash loop
            group.wait_ready(60)
            for _ in range(chance.choice((1, 1, 2))):
                node, who = chance.choice(group.nodes), chance.choice(("engine", "keeper", "coordinator", "relay"))
                if pid := node.pid(who):
                    send(pid, signal.SIGKILL)
            began = time.monotonic()
            group.wait_ready(60)
            # A death on another rank may still be on its way here: then it is out once more, and back.
            wait_for("it serves", lambda: ask(group.leader, 5).status_code == 200, 60, every=0.1)
            took.append(time.monotonic() - began)
    finally:
        done.set()
        watcher.join()
    figures(rounds=len(took), ready_median_s=round(sorted(took)[len(took) // 2], 2), ready_worst_s=round(max(took), 2))
    assert not mixed, mixed[:2]


def _epoch_of(pid: int) -> str:
    """The epoch that an engine's process was started for; empty for every other process."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    return next((text.decode().partition("=")[2] for text in variables if text.startswith(b"SGNODE_EPOCH=")), "")


# --- a second node takes over ---


def test_a_rolling_restart_of_a_group_fails_no_request(model: Path, tmp_path: Path, streams: Streams) -> None:
    store = tmp_path / "store"
    env = {"DYN_FILE_KV": str(store)}
    group = Group(model, 2, "--no-frontend", "--drain-grace", "0.5", name=MODEL)
    for node in group.nodes:
        node.environment.update(env)
    flags = ["--served-model-name", MODEL, "--synthetic", "step_seconds=0.01", "--no-frontend"]
    second = Node(str(model), *flags, name="second", env=env)
    stop = threading.Event()
    results: list[Result] = []

    def client(seed: int) -> None:
        chance = random.Random(seed)
        with Streams() as own:
            while not stop.is_set():
                results.extend(own.start(frontend.url, MODEL, 1, chance.choice((5, 20, 80, 200))))
                own.join()

    try:
        group.start()
        second.start()
        with Frontend(store, 3) as frontend:
            second.wait_ready(60)
            group.wait_ready(60)
            frontend.wait_model(MODEL)
            wait_for("both workers", lambda: len(instances(second, store)) == 2, 20)
            clients = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
            for thread in clients:
                thread.start()
            for node in (group.nodes[1], group.leader):
                before = len(results)
                node.terminate()
                assert node.wait_stopped(60) == 0
                node.start()
                group.wait_ready(60)
                wait_for("registered again", lambda: len(instances(second, store)) == 2, 20)
                assert len(results) > before, "requests ran all the time"
            stop.set()
            for thread in clients:
                thread.join(60)
    finally:
        stop.set()
        group.close()
        second.close()
    bad = [r for r in results if not r.complete]
    print(f"{len(results)} requests, {len(bad)} failed")
    assert len(results) > 50 and not bad, bad[:3]
