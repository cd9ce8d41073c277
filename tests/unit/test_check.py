"""The configuration child with Dynamo's and SGLang's real parsers, which are imported once for all cases."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from procs.cli.serve import CPU_DEFAULTS

ASK = """
import json, sys
from procs.engine.check import answer
for line in sys.stdin:
    print(">" + json.dumps(answer(json.loads(line))), flush=True)
"""
CPU = [part for flag, values in CPU_DEFAULTS.items() for part in (flag, *values)]

Check = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def check(model: Path) -> Iterator[Check]:
    """check(*flags, file={...}) -> the child's answer for the demo model on a CPU."""
    environ = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
    environ.pop("DYN_DISCOVERY_BACKEND", None)
    command = [sys.executable, "-W", "ignore", "-c", ASK]
    with subprocess.Popen(
        command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        stdin, stdout = child.stdin, child.stdout

        def ask(*argv: str, file: dict[str, Any] | None = None, base: bool = True) -> dict[str, Any]:
            whole = ["--model-path", str(model), *CPU, *argv] if base else list(argv)
            stdin.write(json.dumps({"argv": whole, "file": file or {}, "config_file": "node.yaml"}) + "\n")
            stdin.flush()
            line = next(line for line in stdout if line.startswith(">"))
            answer: dict[str, Any] = json.loads(line[1:])
            return answer

        yield ask
        stdin.close()


def refusal(answer: dict[str, Any]) -> str:
    assert answer.keys() == {"error"}, answer
    line = str(answer["error"])
    assert line and "\n" not in line and "Traceback" not in line
    return line


def test_plain_values_of_an_aggregated_worker(check: Check, model: Path) -> None:
    found = check("--served-model-name", "one,two", "--discovery-backend", "file", "--enable-metrics", "--namespace", "ns")
    assert (found["role"], found["model_path"], found["served_model_name"]) == ("aggregated", str(model), "one")
    assert found["enable_metrics"] is True and (found["tp_size"], found["nnodes"], found["node_rank"]) == (1, 1, 0)
    dynamo = found["dynamo"]
    assert (dynamo["namespace"], dynamo["component"], dynamo["endpoint"]) == ("ns", "backend", "generate")
    assert dynamo["served_model_aliases"] == ["two"] and dynamo["discovery_backend"] == "file"
    assert found["worker_argv"][:2] == ["--model-path", str(model)]


@pytest.mark.parametrize(
    ("flag", "role"),
    [
        ("--disaggregation-mode=prefill", "prefill"),
        ("--disaggregation-mode=decode", "decode"),
        ("--embedding-worker", "embedding"),
        ("--rerank-worker", "rerank"),
        ("--image-diffusion-worker", "image"),
        ("--video-generation-worker", "video"),
    ],
)
def test_the_role_is_the_worker_type_that_dynamo_would_start(check: Check, flag: str, role: str) -> None:
    assert check(flag).get("role") == role


def kv_events(**given: Any) -> list[str]:
    return ["--kv-events-config", json.dumps({"publisher": "zmq", **given})]


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--max-total-tokns", "7"], "--max-total-tokns (did you mean --max-total-tokens?)"),
        (["--max-total", "7"], "unknown flag --max-total"),
        (["--max-total-tokns=7"], "--max-total-tokns"),
        (["-x"], "unknown flag -x"),
        (["--tp-size", "two"], "--tp"),
        (["--tp-size"], "--tp"),
        (["--load-format", "floppy"], "--load-format"),
        (["--discovery-backend", "carrier-pigeon"], "--discovery-backend"),
        (["--tool-call-parser", "qwen25", "--dyn-tool-call-parser", "hermes"], "tool-call-parser"),
        (["--custom-jinja-template", "/nonexistent.jinja"], "/nonexistent.jinja"),
        (["--disagg-config", "/nonexistent.yaml"], "disagg_config_key"),
        (["--dedicated-mm-encoder"], "--dedicated-mm-encoder"),
        (["stray"], "stray"),
        (kv_events(endpoint="ipc:///tmp/x"), "endpoint 'ipc:///tmp/x' is not tcp://HOST:PORT"),
        (kv_events(endpoint="tcp://127.0.0.1:5557"), 'use tcp://*:5557, or add "bind": true'),
        (kv_events(endpoint="tcp://*:5557", replay_endpoint="tcp://*:5557"), "endpoint and replay_endpoint overlap"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(check: Check, argv: list[str], names: str) -> None:
    assert names in refusal(check(*argv))


def test_no_model_is_one_line(check: Check) -> None:
    assert "--model" in refusal(check(base=False))


# --- the YAML file ---------------------------------------------------------------------------------------------------


def test_values_of_the_file_become_arguments_before_the_command_line(check: Check, model: Path) -> None:
    file = {
        "--model-path": "/elsewhere",
        "--enable-metrics": True,
        "--disable-radix-cache": False,
        "--exclude-tools-when-tool-choice-none": False,
        "--max-running-requests": 8,
        "--served-model-name": None,
        "--kv-events-config": {"publisher": "zmq", "endpoint": "tcp://*:5557"},
        "--cuda-graph-bs-decode": [1, 2],
    }
    found = check(file=file)
    written = found["worker_argv"][: found["worker_argv"].index("--cuda-graph-bs-decode") + 3]
    assert written == [
        "--model-path", "/elsewhere", "--enable-metrics", "--no-exclude-tools-when-tool-choice-none", "--max-running-requests",
        "8", "--kv-events-config", '{"publisher": "zmq", "endpoint": "tcp://*:5557"}', "--cuda-graph-bs-decode", "1", "2",
    ]  # fmt: skip
    assert found["model_path"] == str(model), "the command line wins"
    assert found["dynamo"]["exclude_tools_when_tool_choice_none"] is False
    assert found["dynamo"]["use_kv_events"] is True


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ({"--max-total-tokns": 7}, "did you mean --max-total-tokens?"),
        ({"--served-model-name": ["a", "b"]}, "served-model-name: expected one value"),
        ({"--enable-metrics": "yes"}, "enable-metrics: expected true or false"),
        ({"--tp-size": "two"}, "--tp"),
        ({"--tp-size": True}, "--tp"),
    ],
)
def test_a_wrong_value_in_the_file_is_one_line(check: Check, file: dict[str, Any], names: str) -> None:
    assert names in refusal(check(file=file))
