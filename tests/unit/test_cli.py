"""The command line without a node: the runtime directory's safety, what serve refuses, the process tree, secrets, exit codes."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from procs.cli import flags, runtime_dir, serve, status
from procs.cli.main import run
from shared.config import NodeConfig
from shared.errors import NodeError
from tests.harness import SGNODE

# --- the runtime directory -------------------------------------------------------------------------------------------


def test_a_claim_makes_a_private_directory_and_abandoning_it_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "node"
    claim = runtime_dir.claim(target, "n")
    assert target.stat().st_mode & 0o777 == 0o700 and (target / "lock").read_text() == f"{os.getpid()}\n"
    claim.prepare()
    (target / "node.json").write_text("{}")
    claim.abandon()
    assert list(tmp_path.iterdir()) == []


def test_abandoning_a_directory_that_was_there_leaves_its_logs(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "engine.log").write_text("before")
    claim = runtime_dir.claim(tmp_path, "n")
    claim.prepare()
    claim.abandon()
    assert [path.name for path in tmp_path.rglob("*")] == ["log", "engine.log"]


def test_a_second_claim_names_the_first_ones_pid(tmp_path: Path) -> None:
    claim = runtime_dir.claim(tmp_path, "n")
    with pytest.raises(NodeError, match=rf"'n' is running already \(pid {os.getpid()}\)"):
        runtime_dir.claim(tmp_path, "n")
    assert runtime_dir.running(tmp_path)
    claim.abandon()
    assert not runtime_dir.running(tmp_path)
    runtime_dir.claim(tmp_path, "n").abandon()


def test_what_a_killed_node_left_goes_but_for_its_logs_and_what_it_has_in_discovery(tmp_path: Path) -> None:
    for name in ("lock", "node.json", "supervisor.conf", "supervisord.pid", "incarnation", "supervisor.sock.123"):
        (tmp_path / name).touch()
    for name in ("log", "sock", "tmp", "discovery", "registrations"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    claim = runtime_dir.claim(tmp_path, "n")
    claim.prepare()
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == ["discovery", "lock", "log", "log/old", "registrations", "registrations/old", "sock", "tmp"]
    claim.abandon()


@pytest.mark.parametrize("name", ["notes.txt", "logic", ".ssh"])
def test_a_directory_with_other_files_is_never_taken(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    mode = tmp_path.stat().st_mode
    with pytest.raises(NodeError, match=name):
        runtime_dir.claim(tmp_path, "n")
    assert [path.name for path in tmp_path.iterdir()] == [name] and tmp_path.stat().st_mode == mode


def test_a_link_or_a_file_is_not_a_runtime_directory(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(NodeError, match="--runtime-dir"):
            runtime_dir.claim(tmp_path / name, "n")


def test_the_shared_base_in_tmp_must_be_this_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "sgnode-0"
    base.mkdir()
    base.chmod(0o777)
    monkeypatch.setattr(runtime_dir, "bases", lambda: [base])
    with pytest.raises(NodeError, match="not this user's alone"):
        runtime_dir.claim(base / "default", "default")
    base.chmod(0o755)
    runtime_dir.claim(base / "default", "default").abandon()


def test_socket_paths_are_measured_at_their_longest() -> None:
    fits = Path("/" + "d" * (107 - len("/" + runtime_dir.SUPERVISOR_BINDS) - 1))
    runtime_dir.check_length(fits, ["coordinator", "agent:0"])
    with pytest.raises(NodeError, match="--runtime-dir"):
        runtime_dir.check_length(Path(f"{fits}d"), ["coordinator", "agent:0"])


def test_the_only_node_that_runs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_dir, "bases", lambda: [tmp_path / "none", tmp_path])
    with pytest.raises(NodeError, match="no node is running"):
        runtime_dir.find(None, None)
    first = runtime_dir.claim(tmp_path / "a", "a")
    assert runtime_dir.find(None, None) == runtime_dir.find("a", None) == tmp_path / "a"
    second = runtime_dir.claim(tmp_path / "b", "b")
    with pytest.raises(NodeError, match="a, b"):
        runtime_dir.find(None, None)
    assert runtime_dir.find("b", None) == tmp_path / "b"
    for claim in (first, second):
        claim.abandon()


# --- serve -----------------------------------------------------------------------------------------------------------


def resolved(tmp_path: Path, *argv: str) -> NodeConfig:
    found = flags.parse(["m", "--synthetic", "step_seconds=0.1", "--http-port", "0", "--system-port", "0", *argv], {})
    return serve.resolve(found, tmp_path, {})


def test_ports_that_are_0_become_two_different_free_ones(tmp_path: Path) -> None:
    config = resolved(tmp_path)
    assert config.http_port != config.system_port and min(config.http_port, config.system_port) > 0


def test_the_frontend_follows_the_discovery_backend_unless_asked_for(tmp_path: Path) -> None:
    assert resolved(tmp_path).frontend and resolved(tmp_path).dynamo.discovery_backend == "file"
    assert not resolved(tmp_path, "--discovery-backend", "etcd").frontend
    assert resolved(tmp_path, "--discovery-backend=etcd", "--frontend").frontend
    assert not resolved(tmp_path, "--no-frontend").frontend


def test_the_frontends_port_is_not_looked_at_when_there_is_none(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        resolved(tmp_path, "--no-frontend", "--http-port", port)
        with pytest.raises(NodeError, match=f"--http-port {port}"):
            resolved(tmp_path, "--http-port", port)
    with pytest.raises(NodeError, match="--http-host"):
        resolved(tmp_path, "--http-host", "192.0.2.1")


@pytest.mark.parametrize(
    ("rank", "frontend", "absent"), [(0, True, []), (0, False, ["frontend"]), (1, False, ["frontend", "agent"])]
)
def test_the_process_tree_has_this_ranks_programs(rank: int, frontend: bool, absent: list[str]) -> None:
    config = NodeConfig(
        name="n", runtime_dir="/r", version="0", role="aggregated", model_path="m", served_model_name="m",
        node_rank=rank, frontend=frontend,
    )  # fmt: skip
    text = serve.process_tree(config)
    for program in ("coordinator", "relay", "engine", "prober", "frontend", "agent"):
        assert (f"[program:{program}]" in text) == (program not in absent)
    assert "[rpcinterface:sgnode]" in text and text.startswith(";")


@pytest.mark.parametrize(
    ("model", "is_path"),
    [
        ("Qwen/Qwen3-8B", False),
        ("gpt2", False),
        ("s3://b/m/x", False),
        ("./m", True),
        ("/m", True),
        ("~/m", True),
        ("a/b/c", True),
    ],
)
def test_what_is_a_path_and_what_may_be_a_hubs_name(model: str, is_path: bool) -> None:
    assert serve.is_path(model) == is_path


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["serve"], "MODEL"),
        (["serve", "./nothing"], "./nothing"),
        (["serve", "m", "--group-key-file", "/nothing"], "--group-key-file"),
        (["serve", "m", "--synthetic", "x"], "--synthetic"),
        (["frob"], "'frob'"),
        (["stop", "--name", "no-such-node"], "no node is running"),
        (["show-config", "--name", "no-such-node"], "no node runs"),
        (["ctl", "--name", "no-such-node", "status"], "no node is running"),
        (["status", "--jsn"], "--jsn"),
        (["demo-model", "/proc/x/y"], "/proc/x/y"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv: list[str], names: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(argv) == 2
    line = capsys.readouterr().err
    assert line.startswith("sgnode: error: ") and names in line and line.count("\n") == 1


# --- the other commands ----------------------------------------------------------------------------------------------


def test_secrets_are_not_shown() -> None:
    argv = [
        "--api-key",
        "s3",
        "--admin-api-key=s3",
        "--ssl-keyfile-password",
        "s3",
        "--disagg-config-key",
        "k",
        "--max-total-tokens",
        "7",
    ]
    shown = status._redacted(argv)
    assert "s3" not in " ".join(shown)
    assert shown[1:3] == ["***", "--admin-api-key=***"] and shown[-4:] == argv[-4:]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert (run(["--help"]), run(["--version"]), run(["serve", "--help"]), run([])) == (0, 0, 0, 2)
    text = capsys.readouterr().out
    assert "sgnode 0." in text and "--drain-timeout" in text and "python -m dynamo.sglang" in text


def test_status_of_no_node_is_3_quick_and_imports_neither_sglang_nor_torch(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(
        [SGNODE, "status", "--runtime-dir", str(tmp_path)], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3 and "no node is running" in done.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "import time:" in line}
    assert {"msgspec", "procs"} <= imported and not imported & {"sglang", "torch", "transformers", "dynamo", "yaml"}
    times = []
    for _ in range(3):
        began = time.monotonic()
        subprocess.run([sys.executable, SGNODE, "status", "--runtime-dir", str(tmp_path)], capture_output=True, check=False)
        times.append(time.monotonic() - began)
    assert min(times) < 0.6, f"seconds: {times}"
