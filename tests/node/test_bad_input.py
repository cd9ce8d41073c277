"""Bad input to `sgnode serve`: one clear line, exit code 2, nothing left running or written."""

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import SGNODE, Node, marked_pids

Make = Callable[..., Node]


def refused(directory: Path, *arguments: str, names: str, env: dict[str, str] | None = None) -> str:
    """Run serve, expect a refusal whose one line names the flag or field, and return the line."""
    command = [SGNODE, "serve", *arguments]
    if "--runtime-dir" not in arguments:
        command += ["--runtime-dir", str(directory / "run")]
    done = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}, capture_output=True, text=True, timeout=90, check=False
    )
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert len(lines) == 1 and lines[0].startswith("sgnode: error:"), done.stderr
    assert names in lines[0], lines[0]
    assert not marked_pids(directory / "run")
    assert not (directory / "run").exists() or "--runtime-dir" in arguments
    return lines[0]


@pytest.fixture
def taken_port() -> socket.socket:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    return taken


def test_unknown_flag(tmp_path: Path, model: Path) -> None:
    line = refused(
        tmp_path, str(model), "--max-total-tokns", "7", "--http-port", "0", "--system-port", "0", names="--max-total-tokns"
    )
    assert "--max-total-tokens" in line, "it offers the flag that was meant"


def test_no_abbreviations(tmp_path: Path, model: Path) -> None:
    refused(tmp_path, str(model), "--max-total", "7", "--http-port", "0", "--system-port", "0", names="--max-total")
    refused(tmp_path, str(model), "--drain-t", "7", "--http-port", "0", "--system-port", "0", names="--drain-t")


def test_missing_model_directory(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path / "nothing"), "--http-port", "0", "--system-port", "0", names=str(tmp_path / "nothing"))


def test_no_model(tmp_path: Path) -> None:
    refused(tmp_path, "--http-port", "0", "--system-port", "0", names="MODEL")


@pytest.mark.parametrize("flag", ["--http-port", "--system-port"])
def test_port_in_use(tmp_path: Path, model: Path, taken_port: socket.socket, flag: str) -> None:
    other = "--system-port" if flag == "--http-port" else "--http-port"
    refused(tmp_path, str(model), flag, str(taken_port.getsockname()[1]), other, "0", names=flag)


def test_two_tool_call_parsers(tmp_path: Path, model: Path) -> None:
    both = ("--tool-call-parser", "qwen25", "--dyn-tool-call-parser", "hermes")
    refused(tmp_path, str(model), *both, "--http-port", "0", "--system-port", "0", names="tool-call-parser")


def test_wrong_value(tmp_path: Path, model: Path) -> None:
    refused(tmp_path, str(model), "--tp-size", "two", "--http-port", "0", "--system-port", "0", names="--tp")
    refused(tmp_path, str(model), "--agents", "none", "--http-port", "0", "--system-port", "0", names="--agents")


@pytest.mark.parametrize("text", ["{unclosed", "- a\n- list\n", "\x00"])
def test_unreadable_yaml(tmp_path: Path, model: Path, text: str) -> None:
    file = tmp_path / "node.yaml"
    file.write_text(text)
    refused(tmp_path, str(model), "--config", str(file), names=str(file))
    file.unlink()
    refused(tmp_path, str(model), "--config", str(file), names=str(file))


def test_unsupported_worker_type(tmp_path: Path, model: Path) -> None:
    refused(tmp_path, str(model), "--image-diffusion-worker", names="image")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make another user's directory")
def test_runtime_directory_of_another_user(tmp_path: Path, model: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    os.chown(other, 12345, 12345)
    refused(tmp_path, str(model), "--runtime-dir", str(other), names="--runtime-dir")
    assert list(other.iterdir()) == []


def test_socket_path_too_long(tmp_path: Path, model: Path) -> None:
    deep = tmp_path / ("d" * 100)
    refused(tmp_path, str(model), "--runtime-dir", str(deep), names="--runtime-dir")
    assert not deep.exists()


def test_a_second_node_of_the_same_name(make_node: Make, model: Path) -> None:
    node = make_node().start().wait_ready(40)
    again = subprocess.run(
        [*node.command(), "--http-port", "0"], env=node.environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert again.returncode == 2 and len(again.stderr.strip().splitlines()) == 1
    assert "test" in again.stderr and "running" in again.stderr
    assert node.status()["state"] == "ready"
