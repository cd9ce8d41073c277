"""The command: before a start with `sgnode serve`'s flags, on a running node, or on this host alone."""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
import psutil

from procs.cli import flags, runtime_dir, serve, status
from procs.cli.doctor import (
    clock,
    deadline,
    discovery,
    disk,
    finding,
    gpu,
    leftovers,
    limits,
    memory,
    model,
    network,
    ports,
    running,
    unit,
    versions,
)  # fmt: skip
from procs.cli.doctor.finding import Finding, Level, error, ok
from procs.cli.doctor.subject import Subject, cut
from shared import config as configuration
from shared import logs
from shared.config import LOCK_FILE
from shared.errors import NodeError

CHECKS: tuple[tuple[str, deadline.Check], ...] = (
    ("node", running.check),
    ("log", running.check_logs),
    ("gpu", gpu.check),
    ("model", model.check),
    ("memory", memory.check),
    ("port", ports.check),
    ("interface", network.check),
    ("discovery", discovery.check),
    ("disk", disk.check),
    ("limits", limits.check),
    ("clock", clock.check),
    ("versions", versions.check),
    ("systemd", unit.check),
    ("leftovers", leftovers.check),
)
WORST_FIRST = (Level.ERROR, Level.WARNING, Level.OK)
CONFIGURATION_SECONDS = 120.0
"""For SGLang's own parser, in its child: it takes 7 s, and a minute from a cold disk."""
DESCRIPTION = """\
Say what would go wrong, and what to do about it. Nothing is started, changed or left behind.

  sgnode doctor MODEL [flags]    before a start: put it in place of `serve`; every flag of serve is taken
  sgnode doctor [--name NAME]    a node that runs (the only one, or by --name or --runtime-dir); without one, this host

Run it as the user that the node runs as. Exit code 0 when there is no error (warnings are none), 4 with one, 2 for a
command line that can't be read."""


def main(argv: list[str]) -> int:
    """Print the findings. 0 without an error, 4 with one. Raises NodeError for a command line that can't be read."""
    made = flags.Parser(prog="sgnode doctor", description=DESCRIPTION, allow_abbrev=False, add_help=False)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.usage = "sgnode doctor [MODEL] [flags of `sgnode serve`] [--json]"
    made.add_argument("-h", "--help", action="store_true", help="show this")
    made.add_argument("--json", action="store_true", help="a JSON array of {level, check, found, todo}")
    asked, rest = made.parse_known_args(argv)
    if asked.help:
        made.print_help()
        return 0
    which = flags.Parser(add_help=False, allow_abbrev=False)
    which.add_argument("--name")
    which.add_argument("--runtime-dir", type=Path)
    node, more = which.parse_known_args(rest)
    subject, found = before(rest) if more else on_node(node)
    found += deadline.run(CHECKS, subject)
    found.sort(key=lambda each: WORST_FIRST.index(each.level))
    print(json.dumps(msgspec.to_builtins(found), indent=1) if asked.json else finding.render(found))
    return finding.exit_code(found)


def before(argv: list[str]) -> tuple[Subject, list[Finding]]:
    """A start with these flags: what `sgnode serve` does up to the point where it would write something."""
    given = flags.parse([*argv, "--no-console"])
    directory = (given.runtime_dir or runtime_dir.default(given.name)).absolute()
    found: list[Finding] = []
    environ: dict[str, str] = dict(os.environ)
    config = None
    try:
        logs.check(os.environ)
        serve.check_files(given)
        environ, notes = serve.hardware(given)
        found += [ok("configuration", cut(note, 80)) for note in notes]
        config = serve.resolve(given, directory, environ, probe=False, timeout=CONFIGURATION_SECONDS)
        environ = {**environ, **serve.environment_of(config, environ)}
        found.append(ok("configuration", f"{config.served_model_name}, {config.role}: SGLang and Dynamo take these flags"))
    except NodeError as refused:
        found.append(error("configuration", str(refused), "`sgnode serve --help-all` has the flags"))
    if runtime_dir.running(directory):
        words = f"node {given.name!r} is running already (pid {holder(directory)})"
        found.append(
            error("node", words, f"another --name, or `sgnode stop`; `sgnode doctor --runtime-dir {directory}` looks at it")
        )
    return Subject(environ, directory, config), found


def on_node(asked: argparse.Namespace) -> tuple[Subject, list[Finding]]:
    """A node that runs; this host where none does. Raises NodeError when it is not clear which is meant."""
    try:
        directory = runtime_dir.find(asked.name, asked.runtime_dir).absolute()
    except NodeError as unclear:
        if "several" in str(unclear):
            raise
        words = "none runs here: this host alone is looked at"
        return Subject(dict(os.environ)), [ok("node", words)]
    if not runtime_dir.running(directory):
        words = f"no node is running in {directory}"
        return Subject(dict(os.environ), directory), [
            error("node", words, "`sgnode serve`; its last words: " + str(directory / "log"))
        ]
    pid = holder(directory)
    try:
        document = status.document_of(directory)
    except (*status.GONE, NodeError):
        document = {}
    return Subject(environ_of(pid), directory, configuration.load(directory), document, pid), []


def holder(directory: Path) -> int:
    """Pid of the supervisord that has the directory's lock; 0 when it can't be read."""
    try:
        return int((directory / LOCK_FILE).read_text())
    except (OSError, ValueError):
        return 0


def environ_of(pid: int) -> Mapping[str, str]:
    """Another process's environment; this one's where it can't be read."""
    try:
        return psutil.Process(pid).environ()
    except psutil.Error:
        return dict(os.environ)
