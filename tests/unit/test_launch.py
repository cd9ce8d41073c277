"""The launcher: commands, environments, and the shipped supervisor.conf under a real supervisord with a real engine life."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from procs import launch
from procs.keeper import leftovers
from shared import config, supervisord
from shared.config import Dynamo, NodeConfig, Synthetic

STATE_SECONDS = 10.0


def node_config(directory: Path = Path("/r"), **changes: Any) -> NodeConfig:
    plain: dict[str, Any] = {
        "name": "t", "runtime_dir": str(directory), "version": "0", "role": "aggregated", "model_path": "m",
        "served_model_name": "m",
    }  # fmt: skip
    return NodeConfig(**(plain | changes))


def test_commands() -> None:
    plain = node_config()
    assert launch.command("engine", None, plain)[1:] == ["-m", "procs.keeper"]
    assert launch.command("agent", 3, plain)[1:] == ["-m", "procs.agent", "3"]
    frontend = launch.command("frontend", None, node_config(http_port=81, dynamo=Dynamo(event_plane=None)))
    assert frontend[2:] == [
        "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", "81",
        "--discovery-backend", "file", "--request-plane", "tcp",
    ]  # fmt: skip
    etcd = node_config(dynamo=Dynamo(discovery_backend="etcd", response_plane="quic"))
    assert launch.command("frontend", None, etcd)[-4:] == ["--response-plane", "quic", "--event-plane", "zmq"]


def test_environments() -> None:
    outside = {
        "PATH": "/bin", "DYN_SYSTEM_PORT": "9090", "DYN_FILE_KV": "/kv", "AWS_SECRET_ACCESS_KEY": "s", "SGNODE_INCARNATION": "4",
        "DYN_EVENT_PLANE_HOST": "10.0.0.1",
    }  # fmt: skip
    plain = node_config()
    agent = launch.environment("agent", outside, plain)
    assert (agent["DYN_SYSTEM_PORT"], agent["DYN_SYSTEM_HOST"], agent["DYN_FILE_KV"]) == ("0", "127.0.0.1", "/kv")
    assert (agent["DYN_TCP_RPC_HOST"], agent["DYN_EVENT_PLANE_HOST"]) == ("127.0.0.1", "10.0.0.1")
    assert "AWS_SECRET_ACCESS_KEY" not in agent
    assert launch.environment("agent", outside, node_config(role="image"))["AWS_SECRET_ACCESS_KEY"] == "s"
    assert "SGNODE_INCARNATION" not in agent
    assert "DYN_SYSTEM_PORT" not in launch.environment("frontend", outside, plain)
    assert launch.environment("engine", outside, plain)["AWS_SECRET_ACCESS_KEY"] == "s"
    assert "DYN_FILE_KV" not in launch.environment("relay", outside, plain)
    relay = launch.environment("relay", outside, node_config(dynamo=Dynamo(use_kv_events=True)))
    assert (relay["DYN_FILE_KV"], relay["DYN_TCP_RPC_HOST"]) == ("/kv", "127.0.0.1") and "DYN_SYSTEM_PORT" not in relay
    cluster = node_config(dynamo=Dynamo(discovery_backend="etcd"))
    far = launch.environment("agent", outside, cluster)
    assert "DYN_TCP_RPC_HOST" not in far and far["DYN_SYSTEM_HOST"] == "0.0.0.0", "others fetch the tokenizer there"
    assert launch.environment("agent", {"DYN_TCP_RPC_HOST": "10.0.0.1"}, cluster)["DYN_SYSTEM_HOST"] == "10.0.0.1"


@pytest.mark.parametrize("argv", [[], ["nobody"], ["supervisord"], ["agent", "x"], ["agent", "0", "1"]])
def test_a_wrong_call_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(argv) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- supervisor.conf, coordinator, keeper and the synthetic engine together ---


def sections(text: str, drop: set[str]) -> str:
    """The configuration without the sections of these programs, as `sgnode serve` makes it."""
    kept, keep = [], True
    for line in text.splitlines():
        if line.startswith("["):
            keep = line.strip("[]").removeprefix("program:") not in drop
        if keep:
            kept.append(line)
    return "\n".join(kept)


def eventually(what: Callable[[], Any], seconds: float = STATE_SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            value = what()
            if value:
                return value
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


class Tree:
    """A follower's tree without its relay and prober: coordinator, keeper, synthetic engine."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def start(self, synthetic: Synthetic) -> None:
        for name in ("log", "sock"):
            (self.directory / name).mkdir()
        made = node_config(self.directory, engine="synthetic", synthetic=synthetic, node_rank=1, frontend=False)
        config.save(made)
        text = (files("procs") / "supervisor.conf").read_text()
        (self.directory / "supervisor.conf").write_text(sections(text, {"relay", "prober", "frontend", "agent"}))
        environ = {
            **os.environ,
            "SGNODE_RUNTIME_DIR": str(self.directory),
            "SGNODE_PYTHON": sys.executable,
            "SGNODE_AGENTS": "1",
            "SGNODE_AGENT_STOPWAIT": "10",
            "SGNODE_ENGINE_STOPWAIT": "10",
        }
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(self.directory / "supervisor.conf")]
        self.process = subprocess.Popen(command, env=environ)

    def node(self) -> dict[str, Any]:
        return dict(json.loads(supervisord.call(self.directory, "sgnode.node")))

    def until(self, state: str, incarnation: int = 1) -> dict[str, Any]:
        def there() -> dict[str, Any] | None:
            node = self.node()
            return node if node["state"] == state and node["incarnation"] >= incarnation else None

        return dict(eventually(there))

    def pid(self, name: str) -> int:
        return int(next(row for row in self.node()["processes"] if row["name"] == name)["pid"] or 0)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    made = Tree(tmp_path)
    yield made
    if made.process.poll() is None:
        made.process.terminate()
        made.process.wait(15)


def test_the_engine_lives_dies_and_lives_again(tree: Tree) -> None:
    tree.start(Synthetic(load_seconds=0.1))
    node = tree.until("ready")
    rows = {row["name"]: row for row in node["processes"]}
    assert rows["engine"]["pid"] != rows["keeper"]["pid"]
    assert rows["engine"]["rss_mb"] > 0
    assert rows["coordinator"]["state"] == "ready"
    coordinator = rows["coordinator"]["pid"]

    # The coordinator's death leaves the engine alone.
    os.kill(coordinator, signal.SIGKILL)
    states, end = set(), time.monotonic() + 2.5
    while time.monotonic() < end:
        states.add(tree.node()["state"])
        time.sleep(0.02)
    assert states == {"ready"}
    assert tree.pid("coordinator") not in (0, coordinator)

    os.kill(rows["engine"]["pid"], signal.SIGKILL)
    node = tree.until("ready", incarnation=2)
    assert node["last_crash"]["reason"] == f"engine (pid {rows['engine']['pid']}) killed by SIGKILL"
    assert next(row for row in node["processes"] if row["name"] == "keeper")["restarts"] == 1
    tree.process.terminate()
    assert tree.process.wait(10) == 0
    assert [path.name for path in tree.directory.iterdir()] == ["log"]
    assert leftovers.find(tree.directory) == []


def test_a_stop_while_loading_is_quick(tree: Tree) -> None:
    tree.start(Synthetic(load_seconds=60))
    tree.until("loading")
    before = time.monotonic()
    tree.process.terminate()
    assert tree.process.wait(10) == 0
    assert time.monotonic() - before < 4.5
    assert leftovers.find(tree.directory) == []


def test_the_shipped_configuration_needs_what_it_says() -> None:
    text = (files("procs") / "supervisor.conf").read_text()
    header = text[: text.index("[")]
    for name in ("RUNTIME_DIR", "PYTHON", "AGENTS", "AGENT_STOPWAIT", "ENGINE_STOPWAIT"):
        assert f"SGNODE_{name} " in header
    used = {part.split(")")[0] for part in text.split("%(ENV_")[1:]}
    assert {f"SGNODE_{name}" for name in ("RUNTIME_DIR", "PYTHON", "AGENTS", "AGENT_STOPWAIT", "ENGINE_STOPWAIT")} == used
    assert "[group:" not in text.split("\n[", 1)[1]
