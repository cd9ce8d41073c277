"""Log lines: two formats, bounded and whole; levels from the environment and at run time; what SGLang's processes are given."""

import io
import json
import logging
import logging.config
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from procs.cli import log_level
from shared import config as configuration
from shared import environment, log_levels, logs
from shared.errors import NodeError
from tests.unit.test_launch import node_config

VARIABLES = ("SGNODE_LOG", "DYN_LOG", *(n for n in vars(logs).values() if isinstance(n, str) and n.startswith("DYN_")))


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process's logging as it was, afterwards."""
    for name in (*VARIABLES, "SGNODE_INCARNATION", "SGNODE_RUNTIME_DIR", logs.NODE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(logs, "facts", {})
    monkeypatch.setattr(log_levels, "_process", "")
    monkeypatch.setattr(log_levels, "on_change", None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    for name in (*log_levels.CHATTY, "sglang"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def written() -> io.StringIO:
    """What the root logger writes from here on."""
    stream = io.StringIO()
    handler = logging.getLogger().handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_readable_is_the_default_and_a_line_has_time_level_and_process() -> None:
    logs.setup("agent:0")
    out = written()
    logging.info("registered: worker %d", 7)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO agent:0: registered: worker 7\n", out.getvalue())


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "readable"),
        ({"DYN_LOGGING_JSONL": "true"}, "jsonl"),
        ({"DYN_LOGGING_JSONL": "1", "DYN_LOGGING_CONSOLE_FORMAT": "readable"}, "readable"),
        ({"DYN_LOGGING_JSONL": "0", "DYN_LOGGING_CONSOLE_FORMAT": " jsonl "}, "jsonl"),
        ({"DYN_LOGGING_JSONL": "1", "DYN_LOGGING_CONSOLE_FORMAT": " "}, "jsonl"),
    ],
)
def test_the_format_is_found_as_dynamo_finds_it(environ: dict[str, str], expected: str) -> None:
    assert logs.format_of(environ) == expected


def test_a_json_line_has_every_field_and_a_traceback_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_LOGGING_JSONL", "1")
    monkeypatch.setenv(logs.NODE_VARIABLE, "gpu-7")
    monkeypatch.setenv("SGNODE_INCARNATION", "3")
    logs.setup("engine")
    out = written()
    logging.warning("two\nlines", extra={"rid": "ab", "request_id": "ctx", "trace_id": ""})
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("sglang.srt").exception("request %s", "ab")
    first, second = lines(out)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", first.pop("time"))
    assert first == {
        "level": "WARN",
        "process": "engine",
        "pid": os.getpid(),
        "node": "gpu-7",
        "incarnation": 3,
        "message": "two\nlines",
        "rid": "ab",
        "request_id": "ctx",
    }
    assert second["target"] == "sglang.srt" and second["exception"].endswith("ValueError: no")
    assert second["level"] == "ERROR" and "Traceback" in second["exception"]


def test_local_time_has_its_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_LOGGING_JSONL", "1")
    monkeypatch.setenv("DYN_LOG_USE_LOCAL_TZ", "1")
    logs.setup("relay")
    out = written()
    logging.info("x")
    assert re.search(r"(Z|[+-]\d\d:\d\d)$", lines(out)[0]["time"])


@pytest.mark.parametrize("text", ["x" * 200_000, "\x01" * 100_000, "é" * 60_000])
def test_a_long_line_stays_whole_json_and_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DYN_LOGGING_JSONL", "1")
    logs.setup("engine")
    out = written()
    try:
        raise ValueError("the cause " + text[-5:])
    except ValueError:
        logging.exception("the message %s", text)
    assert len(out.getvalue().encode()) <= logs.LINE_BYTES + 1
    line = lines(out)[0]
    assert line["message"].startswith("the message ") and "characters left out" in line["message"]
    assert line["exception"].endswith("the cause " + text[-5:])


def test_an_uncaught_exception_is_one_line_also_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_LOGGING_JSONL", "1")
    logs.setup("relay")
    out = written()

    def dies() -> None:
        raise KeyError("k")

    thread = threading.Thread(target=dies, name="io")
    thread.start()
    thread.join()
    error = RuntimeError("main")
    sys.excepthook(RuntimeError, error, None)
    in_thread, in_main = lines(out)
    assert in_thread["message"].endswith("in thread io") and in_thread["exception"].endswith("KeyError: 'k'")
    assert in_main["level"] == "CRITICAL" and "RuntimeError: main" in in_main["exception"]


# --- levels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "root", "targets"),
    [
        ({}, logging.INFO, {}),
        ({"DYN_LOG": "debug"}, logging.DEBUG, {}),
        ({"DYN_LOG": "warn,sglang=debug,dynamo_runtime::x=trace"}, logging.WARNING, {"sglang": 10, "dynamo_runtime::x": 10}),
        ({"DYN_LOG": "debug", "SGNODE_LOG": "ERROR"}, logging.ERROR, {}),
        ({"DYN_LOG": "nonsense"}, logging.INFO, {}),
    ],
)
def test_levels_from_the_environment(environ: dict[str, str], root: int, targets: dict[str, int]) -> None:
    assert log_levels.parse(environ) == (root, targets)


def test_a_level_that_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(NodeError, match=r"SGNODE_LOG: expected one of trace, debug, .* got 'loud'"):
        logs.check({"SGNODE_LOG": "loud"})
    with pytest.raises(NodeError, match="DYN_LOGGING_CONSOLE_FORMAT: expected readable or jsonl, got 'xml'"):
        logs.check({"DYN_LOGGING_CONSOLE_FORMAT": "xml"})


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory whose node runs, and this process as its agent:1."""
    monkeypatch.setenv("SGNODE_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("procs.cli.runtime_dir.running", lambda directory: True)
    configuration.save(node_config(tmp_path, agents=2))
    logs.setup("agent:1")
    return tmp_path


def level() -> str:
    log_levels.follow()
    return logging.getLevelName(logging.getLogger().level)


def test_a_level_at_run_time(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes: list[int] = []
    log_levels.on_change = changes.append

    def say(*words: str) -> str:
        assert log_level.main([*words, "--runtime-dir", str(node)]) == 0
        return level()

    assert say("relay", "debug") == "INFO"  # somebody else
    assert say("agent", "debug") == "DEBUG"
    assert say("agent:1", "warn") == "WARNING"  # one is more than its group
    assert say("agent:0", "error") == "WARNING"
    assert say("agent", "error") == "ERROR"  # the group takes over what was said of one before
    capsys.readouterr()
    assert say() == "ERROR" and capsys.readouterr().out == "agent: error\nrelay: debug\n"
    assert say("agent", "default") == "INFO"
    assert say("off") == "Level 51" and log_levels.read(node) == {"": "off"}
    assert say("default") == "INFO" and log_levels.read(node) == {}
    assert changes == [10, 30, 40, 20, 51, 20]


def test_a_level_at_run_time_is_found_by_the_next_life(node: Path) -> None:
    log_levels.write(node, {"": "debug"})
    logs.setup("agent:1")
    assert logging.getLogger().level == logging.DEBUG


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["loud"], "log-level: expected one of trace, debug, .*, default, got 'loud'"),
        (["nobody", "info"], "log-level: no process 'nobody': expected one of agent, agent:0, agent:1, coordinator"),
        (["agent", "relay", "info"], "expected at most a process and a level"),
    ],
)
def test_a_wrong_level_or_process_is_one_line(node: Path, words: list[str], expected: str) -> None:
    with pytest.raises(NodeError, match=expected):
        log_level.main([*words, "--runtime-dir", str(node)])
    assert log_levels.read(node) == {}


def test_no_room_for_a_level_says_what_to_do(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shared.files.os.open", full)
    with pytest.raises(NodeError, match=r"No space left on device: .*log-levels.json can't be written; make room there"):
        log_level.main(["debug", "--runtime-dir", str(node)])


# --- SGLang's processes ----------------------------------------------------------------------------------------------


def test_sglang_s_processes_log_as_ours_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """What SGLang 0.5.23's configure_logger does with the file, in a scheduler."""
    given = logs.sglang_environment({})["SGLANG_LOGGING_CONFIG_PATH"]
    monkeypatch.setenv("DYN_LOGGING_JSONL", "1")
    monkeypatch.setenv("DYN_LOG", "warn")
    monkeypatch.setattr(logs, "_title", lambda: "scheduler_TP1")
    logging.config.dictConfig(json.loads(Path(given).read_text()))
    out = written()
    logging.getLogger("sglang.srt.managers.scheduler").warning("a batch")
    logging.getLogger("sglang").info("not at this level")
    assert [(line["process"], line["message"]) for line in lines(out)] == [("scheduler_TP1", "a batch")]


def test_sglang_s_own_format_is_left_where_it_is_asked_for() -> None:
    assert logs.sglang_environment({"SGLANG_LOGGING_CONFIG_PATH": "/mine.json"}) == {}
    assert logs.sglang_environment({"DYN_SKIP_SGLANG_LOG_FORMATTING": "1"}) == {}


def test_every_program_gets_what_logging_is_asked_for_by() -> None:
    environ = {"DYN_LOG": "debug", "DYN_LOGGING_JSONL": "1", "DYN_LOG_USE_LOCAL_TZ": "1", "SGNODE_LOG": "info"}
    for program in environment.BY_PROGRAM:
        assert environment.allowed(program, environ) == environ, program
