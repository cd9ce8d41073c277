"""The plugin in a real supervisord with tiny programs: latency, status during shutdown, supervisorctl, sd_notify, clean-up."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
import xmlrpc.client
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from procs.plugin import facts
from shared import config, supervisord
from shared.config import NodeConfig
from shared.frames import ProcessChange
from shared.table import render, span

CONF = """
[unix_http_server]
file=%(ENV_SGNODE_RUNTIME_DIR)s/supervisor.sock
[supervisord]
nodaemon=true
silent=true
logfile=%(ENV_SGNODE_RUNTIME_DIR)s/log/supervisord.log
pidfile=%(ENV_SGNODE_RUNTIME_DIR)s/supervisord.pid
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=procs.plugin:make_main_rpc
[rpcinterface:sgnode]
supervisor.rpcinterface_factory=procs.plugin:make_rpc
[supervisorctl]
serverurl=unix://%(here)s/supervisor.sock
[ctlplugin:sgnode]
supervisor.ctl_factory=procs.plugin:make_ctl
[program:relay]
command=sleep 1000
priority=1
autorestart=true
startsecs=0
stdout_logfile=NONE
stderr_logfile=NONE
[program:agent]
command=sh %(here)s/agent.sh %(process_num)d
process_name=%(process_num)d
numprocs=2
priority=9
startsecs=0
stdout_logfile=%(here)s/log/agent-%(process_num)d.log
stderr_logfile=NONE
"""

AGENT = """
echo hello-$1
trap 'sleep 0.4; exit 0' TERM
while :; do sleep 0.02; done
"""

PATIENT_AGENT = """
trap 'test -n "$asked" && exit 0; asked=1; echo once' TERM
echo patient
while :; do sleep 0.02; done
"""


def eventually(what: Callable[[], Any], seconds: float = 8.0) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            value = what()
            if value:
                return value
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.005)


def a_config(directory: Path) -> NodeConfig:
    return NodeConfig(
        name="t", runtime_dir=str(directory), version="0", role="aggregated", model_path="m", served_model_name="m", agents=2
    )


class Supervisord:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "log").mkdir()
        (directory / "sock").mkdir()
        config.save(a_config(directory))
        (directory / "supervisor.conf").write_text(CONF)
        (directory / "agent.sh").write_text(AGENT)
        self.events = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.events.bind(str(directory / "sock" / "events"))
        self.events.settimeout(5)
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind("\0" + str(directory))
        self.notify.settimeout(5)
        self.environ = {
            **os.environ,
            "SGNODE_RUNTIME_DIR": str(directory),
            "NOTIFY_SOCKET": "@" + str(directory),
            "WATCHDOG_USEC": "3000000",
        }
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(directory / "supervisor.conf")]
        self.process = subprocess.Popen(command, env=self.environ)
        eventually(lambda: self.state("relay") == "RUNNING" and self.state("agent:1") == "RUNNING")

    def call(self, method: str, *args: Any) -> Any:
        return supervisord.call(self.directory, method, *args)

    def node(self) -> dict[str, Any]:
        return dict(json.loads(self.call("sgnode.node")))

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.node()["processes"] if row["name"] == name)

    def state(self, name: str) -> str:
        return str(self.row(name)["supervisor"])

    def wait_event(self, process: str, state: str) -> ProcessChange:
        while True:
            change = msgspec.msgpack.decode(self.events.recv(4096), type=ProcessChange)
            if (change.process, change.state) == (process, state):
                return change

    def ctl(self, *args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "supervisor.supervisorctl", "-c", str(self.directory / "supervisor.conf"), *args]
        environ = {key: value for key, value in os.environ.items() if not key.startswith("SGNODE_")}
        return subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=20)


@pytest.fixture
def sv(tmp_path: Path) -> Iterator[Supervisord]:
    made = Supervisord(tmp_path)
    yield made
    if made.process.poll() is None:
        made.process.terminate()
        made.process.wait(10)
    made.events.close()
    made.notify.close()


def test_a_death_is_seen_at_once_and_counted(sv: Supervisord) -> None:
    row = sv.row("relay")
    assert row["restarts"] == 0
    assert row["rss_mb"] > 0
    assert row["uptime_s"] >= 0
    poller = select.poll()  # select() knows descriptors below 1024 only
    poller.register(sv.events, select.POLLIN)
    while poller.poll(50):
        sv.events.recv(4096)
    latencies = []
    for _ in range(5):
        pid = sv.row("relay")["pid"]
        before = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        sv.wait_event("relay", "EXITED")
        sv.wait_event("relay", "STARTING")
        latencies.append(time.monotonic() - before)
    assert sorted(latencies)[2] < 0.1, latencies
    assert sv.row("relay")["restarts"] == 5


def test_status_works_during_an_ordered_shutdown_and_nothing_but_logs_stays(sv: Supervisord) -> None:
    (sv.directory / "discovery" / "x").mkdir(parents=True)
    assert sv.call("sgnode.update", json.dumps({**sv.node(), "state": "ready", "reason": ""}))["want"] == "serve"
    before = time.monotonic()
    sv.process.send_signal(signal.SIGTERM)
    sv.wait_event("supervisord", "STOPPING")
    assert time.monotonic() - before < 0.3
    node = sv.node()
    assert node["state"] == "draining"
    assert {row["name"]: row["supervisor"] for row in node["processes"]} == {
        "relay": "RUNNING", "agent:0": "STOPPING", "agent:1": "STOPPING",
    }  # fmt: skip
    assert sv.call("sgnode.update", json.dumps(node))["want"] == "stop"
    assert sv.process.wait(5) == 0
    assert time.monotonic() - before < 2
    assert [path.name for path in sv.directory.iterdir()] == ["log"]


def test_a_lost_terminal_is_an_ordered_stop(sv: Supervisord) -> None:
    sv.process.send_signal(signal.SIGHUP)
    assert sv.process.wait(5) == 0


def test_supervisorctl_knows_agent_and_node(sv: Supervisord) -> None:
    pids = {name: sv.row(name)["pid"] for name in ("agent:0", "agent:1", "relay")}
    status = sv.ctl("status", "agent")
    assert "agent:0" in status.stdout
    assert "agent:1" in status.stdout
    assert "relay" not in status.stdout
    restarted = sv.ctl("restart", "agent")
    assert restarted.returncode == 0, restarted.stdout
    assert "agent:1: restarted" in restarted.stdout
    assert sv.row("agent:0")["pid"] != pids["agent:0"]
    assert sv.row("relay")["pid"] == pids["relay"]
    assert "hello-1" in sv.ctl("tail", "agent").stdout
    assert sv.ctl("pid", "agent").stdout.split()[-1] == str(sv.row("agent:1")["pid"])
    sv.ctl("stop", "agent:0")
    assert sv.row("agent:0")["state"] == "stopped"
    assert sv.ctl("start", "agent").returncode == 0
    table = sv.ctl("node")
    assert "node t: starting" in table.stdout
    assert "agent:1" in table.stdout
    assert table.returncode == 4


def test_a_wish_is_kept_and_a_stop_is_not_taken_back(sv: Supervisord) -> None:
    document = json.dumps({**sv.node(), "state": "ready", "reason": ""})
    assert sv.call("sgnode.want", "drain", "because") is True
    assert sv.call("sgnode.want", "drain", "again") is False
    assert (told := sv.call("sgnode.update", document))["want"] == "drain" and told["reason"] == "because"
    sv.wait_event("supervisord", "RUNNING")
    assert sv.ctl("resume").returncode == 0
    assert sv.call("sgnode.update", document)["want"] == "serve"
    assert sv.call("sgnode.hurry") is False
    sv.process.terminate()
    sv.wait_event("supervisord", "STOPPING")
    refused = sv.ctl("drain")
    assert refused.returncode != 0 and "stopping" in refused.stdout


def test_what_would_cut_every_stream_is_refused_with_what_to_type(sv: Supervisord) -> None:
    pids = {name: sv.row(name)["pid"] for name in ("agent:0", "agent:1", "relay")}
    for words, hint in ((["stop", "all"], "sgnode stop"), (["restart", "all"], "sgnode stop"), (["reload"], "sgnode restart")):
        refused = sv.ctl(*words)
        assert refused.returncode != 0 and hint in refused.stdout, refused.stdout
    with pytest.raises(xmlrpc.client.Fault, match="sgnode stop"):
        sv.call("supervisor.stopAllProcesses")
    assert {name: sv.row(name)["pid"] for name in pids} == pids


def test_a_second_sigterm_reaches_the_agents(sv: Supervisord) -> None:
    (sv.directory / "agent.sh").write_text(PATIENT_AGENT)
    assert sv.ctl("restart", "agent").returncode == 0
    logs = [sv.directory / "log" / f"agent-{number}.log" for number in (0, 1)]
    eventually(lambda: all("patient" in log.read_text() for log in logs))
    sv.process.terminate()
    eventually(lambda: sv.node()["want"] == "stop")
    eventually(lambda: all("once" in log.read_text() for log in logs))
    assert sv.process.poll() is None
    before = time.monotonic()
    sv.process.terminate()
    assert sv.process.wait(5) == 0
    assert time.monotonic() - before < 2


def test_systemd_is_told(sv: Supervisord) -> None:
    document = sv.node()
    sv.notify.settimeout(6)

    def told(key: str) -> dict[str, str]:
        """The next datagram that says something of ``key``; heartbeats and extensions come in between."""
        while True:
            lines = sv.notify.recv(4096).decode().splitlines()
            said = dict(line.split("=", 1) for line in lines)
            if key in said:
                return said

    extended = {"EXTEND_TIMEOUT_USEC": "30000000"}
    first = told("STATUS")
    assert first["STATUS"].startswith("starting: ") and first.items() >= extended.items()
    sv.call("sgnode.update", json.dumps({**document, "state": "loading", "reason": "weights", "waiting_for": "the engine"}))
    assert told("STATUS") == {"STATUS": "loading: weights; waiting for the engine"} | extended
    ready = {**document, "state": "ready", "reason": "", "waiting_for": "", "model": "m"}
    sv.call("sgnode.update", json.dumps(ready))
    assert told("STATUS") == {"STATUS": "ready: serving m", "READY": "1"}
    sv.call("sgnode.update", json.dumps(ready))  # nothing new: neither READY nor a status again
    sv.call("sgnode.update", json.dumps({**document, "state": "failed", "reason": "two\nlines", "waiting_for": ""}))
    assert told("STATUS") == {"STATUS": "failed: two lines"}
    assert told("WATCHDOG") == {"WATCHDOG": "1"}
    sv.process.terminate()
    assert told("STOPPING") == {"STOPPING": "1"} | extended


def _facts(**changes: Any) -> facts.ProcessFacts:
    alive: dict[str, Any] = {"pid": os.getpid(), "state": "RUNNING", "started": 1.0, "restarts": 0, "problem": ""}
    return facts.ProcessFacts(**(alive | changes))


def _row(name: str, pid: int | None, state: str) -> dict[str, Any]:
    return {"name": name, "pid": pid, "state": state, "detail": "d", "waiting_for": "w"}


def test_merge_believes_a_process_only_about_its_own_life(tmp_path: Path) -> None:
    me = os.getpid()
    said = [("relay", me, "warming"), ("prober", 1, "ready"), ("engine", me, "loading"), ("keeper", 1, "")]
    document = facts.empty_document(a_config(tmp_path)) | {"processes": [_row(*row) for row in said]}
    processes = {
        "relay": _facts(),
        "prober": _facts(),
        "engine": _facts(),
        "frontend": _facts(state="FATAL", pid=0, problem="no such file"),
    }
    merged = facts.merge(document, 9.0, processes, False)
    rows = {row["name"]: row for row in merged["processes"]}
    assert (rows["relay"]["state"], rows["relay"]["waiting_for"]) == ("warming", "w")
    assert (rows["prober"]["state"], rows["prober"]["pid"], rows["prober"]["detail"]) == ("ready", me, "")
    assert (rows["engine"]["state"], rows["engine"]["uptime_s"] > 0) == ("loading", True)
    assert (rows["frontend"]["state"], rows["frontend"]["pid"], rows["frontend"]["detail"]) == ("failed", None, "no such file")
    assert "as of 9s ago" in render(merged)
    processes["engine"] = _facts(state="STOPPED", pid=0)
    gone = {row["name"]: row for row in facts.merge(document, 0.1, processes, True)["processes"]}
    assert (gone["engine"]["state"], gone["engine"]["pid"]) == ("stopped", None)


def test_table(tmp_path: Path) -> None:
    document = facts.empty_document(a_config(tmp_path)) | {"since": 100.0, "processes": [_row("engine", 12, "loading")]}
    text = render(document, now=165.0)
    assert text == textwrap.dedent("""\
        node t: starting for 1m05s
          the coordinator has not reported yet
          waiting for the coordinator
          http port 8000   system port 9090   registered no   in flight 0   incarnation 0   aggregated, rank 0, sgnode 0

        PROCESS  PID  STATE    UPTIME  RESTARTS  RSS  DETAIL
        engine    12  loading       -         0    -  d; waiting for w""")
    assert render({})
    assert [span(s) for s in (5, 65, 3700, 90000)] == ["5s", "1m05s", "1h01m", "1d01h"]
