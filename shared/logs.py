"""Logging of the node's processes: one line a fact to stderr, readable or JSON; supervisord keeps the files.

Variables and their precedence as in Dynamo 1.6.1's logging reference; levels are in shared/log_levels.py.
"""

import logging
import os
import re
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import msgspec

from shared import log_levels
from shared.errors import NodeError

READABLE, JSONL = "readable", "jsonl"
FORMAT_VARIABLE = "DYN_LOGGING_CONSOLE_FORMAT"
JSONL_VARIABLE = "DYN_LOGGING_JSONL"
LOCAL_TIME_VARIABLE = "DYN_LOG_USE_LOCAL_TZ"
NODE_VARIABLE = "SGNODE_NODE"
"""The node's name, in the environment of all its programs."""
SGLANG_VARIABLE = "SGLANG_LOGGING_CONFIG_PATH"
SKIP_VARIABLE = "DYN_SKIP_SGLANG_LOG_FORMATTING"
FORMAT = "%(asctime)s %(levelname)s {process}: %(message)s"
TIME = re.compile(rb'(?:\{"time":")?(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[,.]\d+(?:Z|[+-]\d\d:\d\d)?)')
LEVELS = {"WARNING": "WARN"}
"""Names of levels in JSON, where Dynamo's differ from Python's."""
IDS = ("request_id", "x_request_id", "rid", "trace_id")
"""What a log call may pass in ``extra``: a request's id of the frontend, of its client, of the engine, of the trace."""
LINE_BYTES = 47 * 1024
"""A JSON line is never longer, so that journald (LineMax= 48K) and the like leave it whole; what is left out is said."""
_GIVEN = os.environ.get(SGLANG_VARIABLE)
"""Before anybody in this process has imported Dynamo: every entry point imports this module first."""
facts: dict[str, Any] = {}
"""Fields of every JSON line: ``process``, ``node``; ``incarnation`` once it is known."""


def setup(process: str) -> None:
    """Configure the root logger of a process, its level included, and send uncaught exceptions there."""
    facts["process"] = process
    facts["pid"] = os.getpid()
    logging.basicConfig(handlers=[handler()], force=True)


def handler() -> logging.Handler:
    """A handler to stderr in the format asked for. Also what SGLang's processes call, by sglang_logging.json."""
    facts.setdefault("process", _title())
    if facts.setdefault("pid", os.getpid()) != os.getpid():  # a forked child of SGLang
        facts.update(process=_title(), pid=os.getpid())
    if node := os.environ.get(NODE_VARIABLE):
        facts["node"] = node
    if incarnation := os.environ.get("SGNODE_INCARNATION"):
        facts["incarnation"] = int(incarnation)
    made = logging.StreamHandler()
    made.setFormatter(formatter())
    if format_of(os.environ) == JSONL:
        logging.captureWarnings(True)
        sys.excepthook = lambda kind, error, trace: logging.critical("uncaught exception", exc_info=(kind, error, trace))
        threading.excepthook = _thread_died
    log_levels.start("engine" if _title() else facts["process"])
    return made


def formatter() -> logging.Formatter:
    """Of the format asked for."""
    local = _truthy(os.environ.get(LOCAL_TIME_VARIABLE, ""))
    if format_of(os.environ) == JSONL:
        return JsonFormatter(local=local)
    return Readable(local=local or not os.environ.get(LOCAL_TIME_VARIABLE))


def format_of(environ: Mapping[str, str]) -> str:
    """``readable`` or ``jsonl``: DYN_LOGGING_CONSOLE_FORMAT, or where that is empty DYN_LOGGING_JSONL."""
    if asked := environ.get(FORMAT_VARIABLE, "").strip().lower():
        return JSONL if asked == JSONL else READABLE
    return JSONL if _truthy(environ.get(JSONL_VARIABLE, "")) else READABLE


def ask(wanted: str | None) -> None:
    """--log-format, for this process and all that it starts. DYN_LOGGING_JSONL goes along: to Dynamo it means trace ids too."""
    if wanted is not None:
        os.environ[FORMAT_VARIABLE] = wanted
        os.environ[JSONL_VARIABLE] = "true" if wanted == JSONL else "false"


def take_back() -> None:
    """After dynamo.sglang, which configures logging when it is imported: this process's, and SGLang's other ones."""
    if (given := _GIVEN) is not None:
        os.environ[SGLANG_VARIABLE] = given
        os.environ[SKIP_VARIABLE] = "1"  # or Dynamo, imported in those as well, would set it again
    setup(facts["process"])


def check(environ: Mapping[str, str]) -> None:
    """Raises NodeError naming a variable whose value can't be meant."""
    if (asked := environ.get(FORMAT_VARIABLE, "").strip().lower()) not in ("", READABLE, JSONL):
        raise NodeError(f"{FORMAT_VARIABLE}: expected {READABLE} or {JSONL}, got {asked!r}")
    log_levels.check(environ)


def sglang_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What makes every process of SGLang 0.5.23 log as the others do (utils/common.py, configure_logger).

    Empty where the user has a configuration of their own, or asks for SGLang's as of dynamo.sglang.
    """
    if SGLANG_VARIABLE in environ or _truthy(environ.get(SKIP_VARIABLE, "")):
        return {}
    return {SGLANG_VARIABLE: str(files("shared") / "sglang_logging.json")}


def time_of(text: bytes) -> float | None:
    """UNIX seconds at the beginning of a line that ``formatter()`` made; None when there are none."""
    found = TIME.match(text)
    if found is None:
        return None
    when = datetime.fromisoformat(found[1].decode().replace(",", ".").replace("Z", "+00:00"))
    if when.tzinfo is None and os.environ.get(LOCAL_TIME_VARIABLE) and not _truthy(os.environ[LOCAL_TIME_VARIABLE]):
        when = when.replace(tzinfo=UTC)
    return when.timestamp()


def line(level: str, message: str) -> bytes:
    """A whole line in the format asked for, for a process without Python's logging: supervisord."""
    record = logging.LogRecord("root", logging.INFO, "", 0, message, None, None)
    record.levelname = level
    return (formatter().format(record) + "\n").encode(errors="replace")


class Readable(logging.Formatter):
    """``2026-11-24 14:23:00,515 INFO coordinator: ...``, in local time; UTC with DYN_LOG_USE_LOCAL_TZ=false."""

    def __init__(self, *, local: bool) -> None:
        super().__init__(FORMAT.format(process=facts["process"]))
        if not local:
            self.converter = lambda seconds: datetime.fromtimestamp(seconds or 0, UTC).timetuple()


class JsonFormatter(logging.Formatter):
    """One JSON object a line, a traceback within it. ``time`` is RFC 3339 with microseconds."""

    def __init__(self, *, local: bool) -> None:
        super().__init__()
        self._zone = None if local else UTC

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).astimezone(self._zone)
        line: dict[str, Any] = {
            "time": when.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "level": LEVELS.get(record.levelname, record.levelname),
            **facts,
            "message": record.getMessage(),
        }
        if record.name != "root":
            line["target"] = record.name
        for name in IDS:
            if value := record.__dict__.get(name):
                line[name] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        elif record.exc_text:
            line["exception"] = record.exc_text
        return _line(line).decode()


def _line(fields: dict[str, Any]) -> bytes:
    """``fields`` encoded in at most LINE_BYTES: a message keeps its beginning, a traceback its end."""
    made = msgspec.json.encode(fields, enc_hook=str)
    room = LINE_BYTES
    while len(made) > LINE_BYTES:
        room //= 2
        short = dict(fields)
        if len(message := fields["message"]) > room // 2:
            short["message"] = f"{message[: room // 2]} ... ({len(message) - room // 2} characters left out)"
        if len(trace := fields.get("exception", "")) > room // 2:
            short["exception"] = f"({len(trace) - room // 2} characters left out) ... {trace[-(room // 2) :]}"
        made = msgspec.json.encode(short, enc_hook=str)
    return made


def _thread_died(args: Any) -> None:
    if args.exc_type is not SystemExit:
        name = args.thread.name if args.thread is not None else "?"
        logging.critical("uncaught exception in thread %s", name, exc_info=(args.exc_type, args.exc_value, args.exc_traceback))


def _title() -> str:
    """A process of SGLang by the title that it gives itself before it configures its logging: ``scheduler_TP0``; else empty."""
    module = sys.modules.get("setproctitle")
    title = str(module.getproctitle()) if module is not None else ""
    return title.removeprefix("sglang::") if title.startswith("sglang::") else ""


def _truthy(text: str) -> bool:
    return text.strip().lower() in ("1", "true", "yes", "on")
