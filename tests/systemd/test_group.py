"""Two instances of sgnode@.service that serve one model: what an operator does to either, and what becomes of the streams."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.harness import Deadline, gone, wait_for
from tests.streams import FOREVER, Result, Streams
from tests.systemd.conftest import yaml
from tests.systemd.machine import CHECKOUT, VENV, Machine, Service

DIST_PORT = 25000
KEY = "/etc/sgnode/group.key"
URL = "http://127.0.0.1:8100"
MODEL = "synthetic"
TIMEOUTS = "[Service]\nTimeoutStartSec=3\nTimeoutStopSec=2\n"
"""Shorter than what waits and drains here: both have to ask for more."""
STREAMS, TOKENS = 16, 250
Figures = Callable[..., None]


@dataclass
class Pair:
    """The two services of the group."""

    leader: Service
    follower: Service

    @property
    def both(self) -> tuple[Service, Service]:
        return self.leader, self.follower

    @property
    def epoch(self) -> int:
        return int(self.leader.document()["epoch"])

    def ready(self, seconds: float = 30.0) -> None:
        """Both are active, and ready in one epoch."""

        def so() -> bool:
            documents = [service.document() for service in self.both]
            states = {document.get("state") for document in documents}
            return states == {"ready"} and documents[0]["epoch"] == documents[1]["epoch"] > 0

        try:
            wait_for("both ready", so, seconds, every=0.1)
        except Deadline as error:
            seen = "\n".join(service.ctl("status", "--no-pager", "-n", "30") for service in self.both)
            raise AssertionError(f"{error}\n{seen}") from error
        for service in self.both:
            service.wait("ActiveState", "active", 5)

    def stop(self) -> None:
        """Neither runs, and earlier starts don't count: the unit allows five an hour."""
        self._ctl("stop")
        self._ctl("reset-failed")

    def start(self) -> None:
        self._ctl("reset-failed")
        self._ctl("start")
        self.ready()

    def _ctl(self, verb: str) -> None:
        self.leader.machine.run("systemctl", verb, *(service.unit for service in self.both))

    def flowing(self, streams: Streams, tokens: int) -> list[Result]:
        """Streams through the leader's frontend, each with a token."""
        curl = ("curl", "-s", f"{URL}/v1/models")
        wait_for("the frontend's model", lambda: MODEL in self.leader.machine.run(*curl), 10)
        results = streams.start(URL, MODEL, STREAMS, tokens)
        streams.flowing(results)
        wait_for("all in the engine", lambda: self.leader.document().get("inflight") == STREAMS, 20)
        return results


@pytest.fixture(scope="module")
def installed(machine: Machine) -> Iterator[Pair]:
    """Configured, with a key, none started."""
    made = Pair(Service(machine, "leader"), Service(machine, "follower"))
    machine.run("env", f"PYTHONPATH={CHECKOUT}", f"{VENV}/bin/python", "-P", "-m", "procs.cli", "group-key", KEY, check=True)
    machine.run("chown", "sgnode:", KEY, check=True)
    place = {"dist-init-addr": f"127.0.0.1:{DIST_PORT}", "group-key-file": KEY}
    group: dict[str, object] = {"tp-size": 2, "nnodes": 2, "drain-grace": 1, **place}
    # The leader loads longer: its registration can't be what the follower's READY waits for.
    for rank, (service, load) in enumerate(zip(made.both, (3.0, 1.0), strict=True)):
        dials = {"load_seconds": load, "step_seconds": 0.02}
        service.configure(yaml(8100 + 10 * rank, **group, **{"node-rank": rank, "synthetic": dials}))
        service.drop_in(TIMEOUTS)
    yield made
    for service in made.both:
        service.machine.run("systemctl", "kill", "-s", "KILL", service.unit)
        service.ctl("stop")
        service.ctl("reset-failed")


@pytest.fixture
def pair(installed: Pair) -> Pair:
    """Ready, whatever the test before has left."""
    installed.start()
    return installed


def said(service: Service) -> str:
    """The one line that `systemctl status` has from the node."""
    status = service.ctl("status", "--no-pager", "--full", "-n", "0").splitlines()
    lines = [line.strip() for line in status if line.strip().startswith("Status: ")]
    assert len(lines) == 1, status
    return lines[0].removeprefix("Status: ").strip('"')


def starting(service: Service) -> subprocess.Popen[str]:
    return service.machine.start("systemctl", "start", service.unit)


def activating(service: Service) -> bool:
    return service.show("ActiveState") == "activating"


def process(service: Service, part: str) -> int:
    """The one process of the unit whose command line has this, by its pid on this host."""
    found = [pid for pid, command in service.pids().items() if part in command]
    assert len(found) == 1, (part, service.pids())
    return found[0]


def ended_well(service: Service) -> bool:
    found = [service.show(key) for key in ("ActiveState", "Result", "ExecMainStatus", "NRestarts")]
    assert found == ["inactive", "success", "0", "0"], service.ctl("status", "--no-pager")
    return not service.pids()


def failed(results: list[Result]) -> list[Result]:
    return [result for result in results if not result.complete or result.tokens != TOKENS]


def test_a_key_that_is_not_the_nodes_alone_is_refused_in_one_line(installed: Pair) -> None:
    installed.stop()
    machine, follower = installed.follower.machine, installed.follower
    lines = {}
    for owner, mode in (("root", "600"), ("sgnode", "640")):
        machine.run("chown", owner, KEY, check=True)
        machine.run("chmod", mode, KEY, check=True)
        follower.ctl("start")
        follower.wait("ActiveState", "failed")
        assert (follower.show("ExecMainStatus"), follower.show("NRestarts")) == ("2", "0")
        lines[owner] = said(follower)
    machine.run("chmod", "600", KEY, check=True)
    assert lines == {
        "root": f"refused: --group-key-file {KEY}: Permission denied",
        "sgnode": f"refused: --group-key-file {KEY}: others can read it; `chmod 600 {KEY}`",
    }


def test_a_follower_alone_waits_and_each_unit_is_active_when_its_node_is_ready(installed: Pair, figures: Figures) -> None:
    installed.stop()
    leader, follower = installed.both
    began = time.monotonic()
    first = starting(follower)
    wait_for("its word", lambda: follower.show("StatusText").startswith("waiting"), 20, every=0.1)
    while time.monotonic() - began < 5:  # past the timeout
        assert activating(follower) and first.poll() is None
    alone = said(follower)
    assert alone.startswith(f"waiting: rank 0 of 2 (the leader, 127.0.0.1:{DIST_PORT + 100}) not seen, "), alone
    assert "engine" not in " ".join(follower.pids().values())

    asked = time.monotonic()
    second = starting(leader)
    for service in installed.both:
        wait_for("loading", lambda service=service: service.show("StatusText").startswith("loading"), 20)
        assert activating(service)
    while activating(follower):
        assert time.monotonic() - asked < 20, follower.ctl("status")
    follower_s = time.monotonic() - asked
    assert follower.document()["state"] == follower.row("engine")["state"] == "ready"
    assert activating(leader) and not leader.instances(), "the leader is not what the follower's READY waits for"
    while activating(leader):
        assert time.monotonic() - asked < 30, leader.ctl("status")
    leader_s = time.monotonic() - asked
    assert len(leader.instances()) == 1, "active: in discovery"
    assert (first.wait(5), second.wait(5)) == (0, 0)
    installed.ready()
    figures(alone=alone, follower_s=round(follower_s, 1), leader_s=round(leader_s, 1))
    wait_for("the leader serves", lambda: said(leader) == "ready: serving synthetic", 5)
    wait_for("the follower knows", lambda: said(follower) == "ready: the leader is ready", 5)
    assert [service.show("NRestarts") for service in installed.both] == ["0", "0"]


def test_a_followers_stop_under_streams_waits_for_the_leaders_drain(pair: Pair, streams: Streams, figures: Figures) -> None:
    leader, follower = pair.both
    epoch, main = pair.epoch, leader.main_pid()
    engine = process(follower, "procs.engine")
    results = pair.flowing(streams, TOKENS)
    asked = time.monotonic()
    stopping = follower.machine.start("systemctl", "stop", follower.unit)
    wait_for("the leader drains", lambda: leader.show("StatusText").startswith(f"draining: {STREAMS} streams left"), 10)
    assert follower.show("ActiveState") == "deactivating" and stopping.poll() is None
    wait_for("so says the follower", lambda: follower.show("StatusText").startswith(f"draining: {STREAMS} streams left"), 10)
    draining = said(follower)
    assert draining.endswith("; waiting for the leader's drain"), draining
    assert not gone(engine), "the streams need it"
    streams.join()
    assert max(result.ended for result in results) - asked > 2.5, "it has to outlast TimeoutStopSec"
    assert stopping.wait(20) == 0
    stop_s = time.monotonic() - asked
    assert not failed(results), failed(results)[0]
    wait_for("nothing left", lambda: ended_well(follower), 5)
    wait_for("the leader waits", lambda: "rank 1 of 2 not seen" in leader.show("StatusText"), 10)
    alone = said(leader)
    assert leader.show("ActiveState") == "active" and leader.main_pid() == main

    again = time.monotonic()
    follower.ctl("start")
    assert follower.show("ActiveState") == "active"
    pair.ready()
    measured = {"stop_s": round(stop_s, 1), "ready_again_s": round(time.monotonic() - again, 1)}
    figures(failed=len(failed(results)), **measured, draining=draining, alone=alone, epoch=pair.epoch)
    assert pair.epoch == epoch + 1 and leader.main_pid() == main and leader.show("NRestarts") == "0"


def test_a_leaders_stop_under_streams_leaves_the_follower_waiting(pair: Pair, streams: Streams, figures: Figures) -> None:
    leader, follower = pair.both
    results = pair.flowing(streams, TOKENS)
    asked = time.monotonic()
    stopping = leader.machine.start("systemctl", "stop", leader.unit)
    wait_for("it drains", lambda: leader.show("StatusText").startswith(f"draining: {STREAMS} streams left"), 10)
    wait_for("so says the follower", lambda: said(follower) == "ready: the leader is draining", 3)
    streams.join()
    assert stopping.wait(20) == 0
    stop_s = time.monotonic() - asked
    assert not failed(results), failed(results)[0]
    wait_for("nothing left", lambda: ended_well(leader), 5)
    wait_for("the follower waits", lambda: "rank 0 of 2" in follower.show("StatusText"), 10)
    alone = said(follower)
    assert follower.show("ActiveState") == "active"

    # Nobody is there who could drain: nothing is waited for.
    again = time.monotonic()
    follower.ctl("stop")
    follower_s = time.monotonic() - again
    wait_for("nothing left", lambda: ended_well(follower), 5)
    figures(failed=len(failed(results)), stop_s=round(stop_s, 1), alone=alone, followers_stop_s=round(follower_s, 1))
    assert follower_s < 5


def test_a_killed_follower_ends_the_streams_and_comes_back(pair: Pair, streams: Streams, figures: Figures) -> None:
    leader, follower = pair.both
    epoch, main, restarts = pair.epoch, leader.main_pid(), int(follower.show("NRestarts"))
    results = pair.flowing(streams, FOREVER)
    pids = set(follower.pids())
    killed = time.monotonic()
    os.kill(follower.main_pid(), signal.SIGKILL)
    wait_for("everything dead", lambda: all(gone(pid) for pid in pids), 1, every=0.005)
    streams.join(20)
    ended_s = max(result.ended for result in results) - killed
    assert all(result.error and not result.finish for result in results), results
    wait_for("started anew", lambda: int(follower.show("NRestarts")) == restarts + 1, 10, every=0.1)
    wait_for("the next epoch", lambda: leader.document()["epoch"] == epoch + 1, 20, every=0.1)
    pair.ready()
    figures(streams_ended_s=round(ended_s, 2), ready_again_s=round(time.monotonic() - killed, 1), error=results[0].error)
    assert leader.main_pid() == main and leader.show("NRestarts") == "0" and leader.show("ActiveState") == "active"
