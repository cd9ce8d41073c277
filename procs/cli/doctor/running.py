"""A node that runs: its state, its processes, what they count and log, its HTTP ports, its engine's cgroup."""

import hashlib
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from procs.cli.doctor.finding import Finding, error, ok, warning
from procs.cli.doctor.subject import Subject, cut
from shared.config import LOG_DIR
from shared.state import LOST, State
from shared.table import span

NEWS_SECONDS = 86_400.0
"""A crash or an ERROR line is news for so long."""
HTTP_SECONDS = 2.0
TAIL_BYTES = 256 * 1024
LOST_COUNTS = {
    "dropped_frames": "frames that did not decode",
    "kv_event_frames_lost": "frames of KV events that nobody has any more",
    "kv_events_dropped": "KV events that did not decode",
    "kv_blocks_unplaced": "KV blocks that could not be taken",
}
"""Numbers in a process's beat that stay 0 as long as all is well."""
LEVEL_WORD = re.compile(r"\b(DEBUG|INFO|WARN|WARNING|ERROR|CRITICAL|FATAL)\b")
LEVEL_WITHIN = 64
"""Of a line: after that, it is a word of the message."""
JSON_ERROR = re.compile(r'"level": ?"(ERROR|CRITICAL|FATAL)"', re.IGNORECASE)
BAD = ("ERROR", "CRITICAL", "FATAL")
WRITTEN = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)")
PATIENCE = (State.WAITING, State.STARTING, State.LOADING, State.WARMING)


def check(subject: Subject) -> Iterator[Finding]:
    if not subject.running or subject.config is None:
        return
    if not subject.document:
        yield error(
            "node",
            "supervisord runs and does not answer",
            f"`systemctl restart`, or SIGKILL pid {subject.supervisord}: all of the node ends with it",
        )
        return
    yield from state(subject.document)
    yield from crash(subject.document, time.time())
    yield from group(subject.document)
    for row in subject.document.get("processes", ()):
        yield from process(row, _status(row.get("pid")))
    yield from http(subject)
    yield from cgroup(subject)


def check_logs(subject: Subject) -> Iterator[Finding]:
    if subject.running and subject.directory is not None:
        yield from errors(subject.directory / LOG_DIR, time.time())


def _status(pid: int | None) -> str:
    try:
        return str(psutil.Process(pid).status()) if pid else ""
    except psutil.Error:
        return ""


def state(document: Mapping[str, Any]) -> Iterator[Finding]:
    now, reason = document.get("state", "?"), document.get("reason") or ""
    waiting = document.get("waiting_for") or ""
    since = document.get("since")
    words = now + (f" for {span(time.time() - since)}" if since else "")
    words += f": {reason}" if reason else ""
    words += f"; waiting for {waiting}" if waiting else ""
    if document.get("stale_s"):
        yield error(
            "node",
            f"its coordinator says nothing for {span(document['stale_s'])}",
            "`sgnode ctl tail coordinator`, `sgnode restart coordinator`",
        )
    if now == State.READY:
        yield ok("node", words)
    elif now in (State.FAILED, State.UNHEALTHY, State.STOPPED):
        yield error("node", words, "`sgnode ctl tail -20000 engine`; then `sgnode restart engine`")
    else:
        todo = {
            State.DRAINED: "`sgnode resume`",
            State.SLEEPING: "`sgnode wake`",
            State.PAUSED: "POST /engine/continue_generation",
        }
        yield warning("node", words, todo.get(now, "`sgnode status`"))


def crash(document: Mapping[str, Any], now: float) -> Iterator[Finding]:
    last = document.get("last_crash")
    if last and now - last["at"] < NEWS_SECONDS:
        yield warning("engine", f"died {span(now - last['at'])} ago: {last['reason']}", f"see {last['path']}")


def group(document: Mapping[str, Any]) -> Iterator[Finding]:
    """On the leader: who is missing or not alike, whose clock is off."""
    found = document.get("group") or {}
    for line in found.get("differences", ()):
        todo = "`timedatectl set-ntp true` on both" if "clock" in line else "the same flags, versions and model on every rank"
        yield error("group", line, todo)
    missing = [str(each["node_rank"]) for each in found.get("ranks", ()) if each["seen_s"] is None or each["seen_s"] > 2]
    if missing:
        yield error(
            "group", f"rank {', '.join(missing)} is not heard", "start it there; `sgnode doctor` there says what is wrong"
        )


def process(row: Mapping[str, Any], status: str) -> Iterator[Finding]:
    """One line of the status table; ``status``: psutil's word for its process."""
    name, said = str(row.get("name")), row.get("detail") or ""
    log = "engine" if name in ("engine", "keeper") else name
    todo = f"`sgnode ctl tail {log}`; `sgnode restart {'engine' if log == 'engine' else name.partition(':')[0]}`"
    now = row.get("state") or "?"
    if status == psutil.STATUS_STOPPED:
        yield error(name, f"pid {row['pid']} is stopped (SIGSTOP)", f"`kill -CONT {row['pid']}`")
    elif status == psutil.STATUS_DISK_SLEEP:
        yield warning(
            name, f"pid {row['pid']} waits in the kernel (D)", "again in a minute; if it stays: `dmesg`, the disk, the driver"
        )
    elif now in (LOST, State.FAILED, State.STOPPED):
        words = "no sign of life" if now == LOST else now
        yield error(name, f"{words}{f': {said}' if said else ''}", todo)
    elif now == State.UNHEALTHY:
        yield error(name, f"unhealthy: {said or row.get('waiting_for') or '?'}", todo)
    elif now in PATIENCE:
        yield warning(name, f"{now}: {said or row.get('waiting_for') or 'not up yet'}", "`sgnode status`")
    else:
        yield ok(name, f"{now}, pid {row.get('pid')}{f', {said}' if said else ''}")
    if "file store can't" in said:
        yield error(name, said.partition("; ")[2] or said, "its owner and mode")
    if row.get("restarts") and name != "engine":
        yield warning(
            name,
            "restarted once" if row["restarts"] == 1 else f"restarted {row['restarts']} times",
            f"`sgnode ctl tail {log}` says why",
        )
    for key, words in LOST_COUNTS.items():
        if count := (row.get("numbers") or {}).get(key):
            yield warning(name, f"{count:g} {words}", f"`sgnode ctl tail {log}`; versions that don't fit?")


def http(subject: Subject) -> Iterator[Finding]:
    config = subject.config
    assert config is not None
    asked = [("system port", config.system_host, config.system_port, "/live", "prober")]
    if config.frontend and config.leads:
        asked.append(("http port", config.http_host, config.http_port, "/v1/models", "frontend"))
    for name, host, port, path, program in asked:
        reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        url = f"http://{f'[{reached}]' if ':' in reached else reached}:{port}{path}"
        try:
            with urllib.request.urlopen(url, timeout=HTTP_SECONDS) as answer:
                answer.read(1)
            yield ok(name, f"{url} answers")
        except urllib.error.HTTPError as refused:
            yield error(name, f"{url}: HTTP {refused.code}", "`sgnode status` says why")
        except OSError as failure:
            said = getattr(failure, "reason", failure)
            words = f"no answer within {HTTP_SECONDS:g} s" if isinstance(said, TimeoutError) else str(said)
            yield error(name, f"{url}: {words}", f"`sgnode ctl tail {program}`; `sgnode restart {program}`")


def cgroup(subject: Subject) -> Iterator[Finding]:
    """The engine's own, by which everything in it is killed at once (procs/keeper/cgroup.py)."""
    pid = next((row.get("pid") for row in subject.document.get("processes", ()) if row.get("name") == "engine"), None)
    if not pid:
        return
    name = "sgnode-" + hashlib.sha256(str(subject.directory).encode()).hexdigest()[:16]
    try:
        inside = any(line.endswith(f"/{name}") for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
    except OSError:
        return
    if inside:
        yield ok("engine", f"has a cgroup of its own, {name}")
    elif "INVOCATION_ID" in subject.environ:
        yield warning(
            "engine",
            "has no cgroup of its own: what it leaves is killed one by one",
            "Delegate=yes in the unit, Linux 5.14 or newer",
        )
    else:
        yield ok("engine", "has no cgroup of its own here (none can be made): what it leaves is killed one by one")


def errors(directory: Path, now: float) -> Iterator[Finding]:
    """The last ERROR line of each log, with how many there are at its end."""
    quiet = True
    for path in sorted(directory.glob("*.log")) if directory.is_dir() else ():
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        found = [line for line in lines if is_error(line) and fresh(line, now)]
        if found:
            quiet = False
            yield warning("log", f"{path.name}: ERROR lines: {len(found)}, the last: {cut(found[-1], 160)}", f"`less {path}`")
    if quiet:
        yield ok("log", f"no ERROR line in {directory} of the last day")


def is_error(line: str) -> bool:
    """A line of our processes, of SGLang's or Dynamo's, or JSON."""
    if line.startswith("{"):
        return JSON_ERROR.search(line) is not None
    level = LEVEL_WORD.search(line[:LEVEL_WITHIN])
    return level is not None and level[1] in BAD


def fresh(line: str, now: float) -> bool:
    """Written within NEWS_SECONDS; a line without a time counts."""
    match = WRITTEN.search(line[:LEVEL_WITHIN])
    if match is None:
        return True
    return now - datetime.fromisoformat(f"{match[1]} {match[2]}").timestamp() < NEWS_SECONDS
