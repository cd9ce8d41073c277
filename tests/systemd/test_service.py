"""sgnode@.service under a booted systemd: what an operator does to it, and what happens to the streams."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.harness import gone, wait_for
from tests.streams import FOREVER, Result, Streams
from tests.systemd.conftest import yaml
from tests.systemd.machine import Machine, Service

PORT = 8100
URL = f"http://127.0.0.1:{PORT}"
MODEL = "synthetic"
Figures = Callable[..., None]


def start(service: Service, seconds: float = 60.0) -> None:
    service.ctl("start", timeout=seconds)
    assert service.show("ActiveState") == "active", service.ctl("status", "--no-pager")


def flowing(service: Service, streams: Streams, count: int, tokens: int) -> list[Result]:
    # The frontend hears of the model some milliseconds after the node is ready.
    wait_for("the frontend's model", lambda: MODEL in service.machine.run("curl", "-s", f"{URL}/v1/models"), 10)
    results = streams.start(URL, MODEL, count, tokens)
    streams.flowing(results)
    wait_for(f"{count} streams in the engine", lambda: service.status().get("inflight") == count, 20)
    return results


def process(service: Service, part: str) -> int:
    """The one process of the unit whose command line has this, by its pid on this host."""
    found = [pid for pid, command in service.pids().items() if part in command]
    assert len(found) == 1, (part, service.pids())
    return found[0]


def journal(service: Service, *arguments: str) -> list[dict[str, Any]]:
    text = service.machine.run("journalctl", "-u", service.unit, "-o", "json", "--no-pager", *arguments)
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


# --- the unit itself -------------------------------------------------------------------------------------------------


def test_the_unit_is_valid_and_its_exposure_is_the_documented_one(machine: Machine, figures: Figures) -> None:
    assert machine.run("systemd-analyze", "verify", "--recursive-errors=yes", "sgnode@default.service") == ""
    wrong = "/etc/systemd/system/sgnode@wrong.service.d/test.conf"
    machine.write(wrong, "[Service]\nNoSuchDirective=yes\n")
    assert "NoSuchDirective" in machine.run("systemd-analyze", "verify", "--recursive-errors=yes", "sgnode@wrong.service")
    table = machine.run("systemd-analyze", "security", "--no-pager", "sgnode@default.service")
    exposure = float(table.rpartition("exposure level for sgnode@default.service:")[2].split()[0])
    figures(exposure=exposure)
    assert exposure <= 2.4, table


# --- start -----------------------------------------------------------------------------------------------------------


def test_ready_is_said_after_registration_however_long_the_load_takes(service: Service) -> None:
    service.configure(yaml(PORT, synthetic={"load_seconds": 6.0}))
    service.drop_in("[Service]\nTimeoutStartSec=2\n")
    began = time.monotonic()
    starting = service.machine.start("systemctl", "start", service.unit)
    wait_for("loading", lambda: service.show("StatusText").startswith("loading"), 20, every=0.1)
    while time.monotonic() - began < 4:  # past the timeout
        assert service.show("ActiveState") == "activating" and starting.poll() is None
        assert not service.instances()
    while service.show("ActiveState") == "activating":
        assert time.monotonic() - began < 40, service.ctl("status", "--no-pager")
    assert len(service.instances()) == 1, "active: in discovery"
    assert starting.wait(5) == 0 and service.show("ActiveState") == "active"
    assert service.show("StatusText") == "ready: serving synthetic"
    assert service.show("NRestarts") == "0" and service.status()["registered"]


def test_each_process_has_its_name_in_the_journal(service: Service) -> None:
    start(service)
    names = {"supervisord", "coordinator", "relay", "prober", "engine", "agent:0", "frontend"}
    wait_for("a line of each", lambda: {row.get("SGNODE_PROCESS") for row in journal(service)} >= names - {"relay", "prober"}, 10)
    agent = journal(service, "-t", "sgnode-agent-0")
    registered = [row for row in agent if "registered: worker" in str(row["MESSAGE"])]
    assert len(registered) == 1 and registered[0]["SGNODE_NODE"] == service.name
    pids = {row["SYSLOG_PID"] for row in agent if "SYSLOG_PID" in row}
    assert pids == {str(service.row("agent:0")["pid"])}
    assert {row["SYSLOG_IDENTIFIER"] for row in agent} == {"sgnode-agent-0"}


# --- stop and reload -------------------------------------------------------------------------------------------------


def test_a_stop_under_load_loses_no_stream(service: Service, streams: Streams, figures: Figures) -> None:
    service.configure(yaml(PORT, synthetic={"step_seconds": 0.02}))
    service.drop_in("[Service]\nTimeoutStopSec=2\n")
    start(service)
    results = flowing(service, streams, 32, 250)
    asked = time.monotonic()
    stopping = service.machine.start("systemctl", "stop", service.unit)
    wait_for("progress", lambda: service.show("StatusText").startswith("draining: 32 streams left"), 10, every=0.05)
    assert service.show("ActiveState") == "deactivating"
    streams.join()
    assert all(r.complete and r.tokens == 250 for r in results), [r for r in results if not r.complete][:1]
    assert max(r.ended for r in results) - asked > 2.5, "it has to outlast TimeoutStopSec"
    assert stopping.wait(20) == 0
    figures(stop_s=round(time.monotonic() - asked, 1))
    assert (service.show("ActiveState"), service.show("Result"), service.show("ExecMainStatus")) == ("inactive", "success", "0")
    assert not service.pids()


def test_a_reload_takes_up_a_changed_tree_and_keeps_the_engine(service: Service, streams: Streams) -> None:
    start(service)
    results = flowing(service, streams, 4, 300)
    engine, prober = process(service, "procs.engine"), process(service, "procs.prober")
    tree = f"/run/sgnode/{service.name}/supervisor.conf"
    changed = service.machine.read(tree).replace("-m procs.launch prober\n", "-m procs.launch prober\nenvironment=CHANGED=1\n")
    assert "CHANGED" in changed
    service.machine.write(tree, changed)
    service.ctl("reload")
    wait_for("another prober", lambda: gone(prober), 10)
    wait_for("it is back", lambda: service.row("prober").get("state") == "ready", 20)
    assert process(service, "procs.engine") == engine
    streams.join()
    assert all(r.complete and r.tokens == 300 for r in results), results
    assert service.show("ActiveState") == "active" and service.show("NRestarts") == "0"


# --- the end of supervisord ------------------------------------------------------------------------------------------


def test_a_killed_supervisord_leaves_nothing_and_the_service_comes_back(
    service: Service, streams: Streams, figures: Figures
) -> None:
    start(service)
    flowing(service, streams, 4, FOREVER)
    pids = set(service.pids())
    assert len(pids) > 8
    main, killed = service.main_pid(), time.monotonic()
    os.kill(main, signal.SIGKILL)
    wait_for("everything dead", lambda: all(gone(pid) for pid in pids), 1, every=0.005)
    dead = time.monotonic() - killed
    service.wait("ActiveState", "active")
    wait_for("registered", lambda: service.status().get("state") == "ready", 10, every=0.1)
    figures(dead_ms=round(dead * 1e3), ready_again_s=round(time.monotonic() - killed, 1))
    assert service.show("NRestarts") == "1" and service.main_pid() != main


def test_a_supervisord_that_hangs_is_killed_by_the_watchdog(service: Service, figures: Figures) -> None:
    service.drop_in("[Service]\nWatchdogSec=3\n")
    start(service)
    # Alive past the deadline when nothing hangs.
    steady = time.monotonic()
    pids = set(service.pids())
    wait_for("heartbeats", lambda: time.monotonic() - steady > 4, 6, every=0.5)
    assert service.show("NRestarts") == "0"
    main = service.kill(signal.SIGSTOP)
    stopped = time.monotonic()
    wait_for("state T", lambda: "T (stopped)" in Path(f"/proc/{main}/status").read_text(), 1, every=0.005)
    wait_for("killed", lambda: gone(main), 5)
    killed = time.monotonic()
    assert killed - stopped > 1
    wait_for("everything dead", lambda: all(gone(pid) for pid in pids), 1, every=0.005)
    figures(killed_s=round(killed - stopped, 1), dead_ms=round((time.monotonic() - killed) * 1e3))
    service.wait("NRestarts", "1")
    service.wait("ActiveState", "active")
    assert "watchdog" in " ".join(str(row["MESSAGE"]) for row in journal(service)).lower()


def test_killmode_control_group_loses_no_stream_silently(service: Service, streams: Streams, figures: Figures) -> None:
    service.configure(yaml(PORT, synthetic={"step_seconds": 0.02}))
    service.drop_in("[Service]\nKillMode=control-group\n")
    start(service)
    results = flowing(service, streams, 16, 300)
    asked = time.monotonic()
    stopping = service.machine.start("systemctl", "stop", service.unit)
    streams.join(60)
    assert stopping.wait(30) == 0
    complete = [r for r in results if r.complete and r.tokens == 300]
    failed = [r for r in results if r.error and not r.finish]
    cut = [r for r in failed if r.error.startswith("Client")]
    figures(complete=len(complete), failed=len(failed), cut=len(cut), stop_s=round(time.monotonic() - asked, 1))
    assert len(complete) + len(failed) == len(results), results
    assert not service.pids() and service.show("Result") == "success"


# --- failure ---------------------------------------------------------------------------------------------------------


def test_a_refused_configuration_is_one_line_and_is_not_tried_again(service: Service) -> None:
    service.configure(yaml(PORT) + "agents: many\n")
    service.ctl("start")
    service.wait("ActiveState", "failed")
    assert (service.show("ExecMainStatus"), service.show("NRestarts")) == ("2", "0")
    status = service.ctl("status", "--no-pager", "--full").splitlines()
    said = [line.strip() for line in status if "agents" in line and "many" in line]
    assert len([line for line in said if line.startswith("Status: ")]) == 1, status
    assert len([row for row in journal(service, "-t", "sgnode") if "many" in str(row["MESSAGE"])]) == 1


def test_an_engine_that_does_not_load_says_why(service: Service) -> None:
    service.configure(yaml(PORT, synthetic={"fault": "load"}))
    starting = service.machine.start("systemctl", "start", service.unit)
    wait_for("why", lambda: "the next start in" in service.show("StatusText"), 20, every=0.1)
    status = service.ctl("status", "--no-pager", "--full").splitlines()
    said = [line.strip() for line in status if line.strip().startswith("Status: ")]
    assert len(said) == 1 and "exited with code 1" in said[0], status
    assert service.show("ActiveState") == "activating"
    engine = [str(row["MESSAGE"]) for row in journal(service, "-t", "sgnode-engine")]
    assert any("synthetic fault: load" in line for line in engine), engine
    os.kill(service.main_pid(), signal.SIGTERM)
    starting.wait(30)
