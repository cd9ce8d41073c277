"""`sgnode log-level`: how much the processes of a node that runs log from now on."""

import argparse

from procs.cli import runtime_dir
from procs.cli.status import directory_of, parser_of
from shared import config as configuration
from shared import log_levels
from shared.errors import NodeError
from shared.log_levels import ALL

DEFAULT = "default"
"""Back to what the node was started with."""
DESCRIPTION = """\
Change the log level of a process (engine, agent, agent:0, relay, ...), or of all, while the node runs; it holds until the node
ends, over restarts of a process. `default`: what the node was started with. Without a level: show what was changed.
The engine's takes SGLang's schedulers and detokenizer along. Dynamo's Rust runtime and the frontend keep DYN_LOG."""


def main(argv: list[str]) -> int:
    """Set or show levels. Raises NodeError naming what was wrong."""
    made = parser_of("log-level", DESCRIPTION)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.usage = "sgnode log-level [PROCESS] [LEVEL] [--name NAME] [--runtime-dir DIR]"
    made.add_argument("words", nargs="*", metavar="PROCESS | LEVEL", help=f"levels: {', '.join(log_levels.NAMES)}, {DEFAULT}")
    found = made.parse_args(argv)
    directory = directory_of(found)
    if not runtime_dir.running(directory):
        raise NodeError(f"no node is running in {directory}")
    levels = log_levels.read(directory)
    if found.words:
        *processes, level = found.words
        _check(processes, level, configuration.load(directory).processes)
        levels = _changed(levels, processes[0] if processes else ALL, level.lower())
        try:
            log_levels.write(directory, levels)
        except OSError as error:
            raise NodeError(f"log-level: {error.strerror}") from error
    for process, level in sorted(levels.items()) or [(ALL, "as the node was started")]:
        print(f"{process or 'all'}: {level}")
    return 0


def _check(processes: list[str], level: str, known: list[str]) -> None:
    if len(processes) > 1:
        raise NodeError(f"log-level: expected at most a process and a level, got {' '.join([*processes, level])}")
    names = {*known, *(name.partition(":")[0] for name in known)}
    if processes and processes[0] not in names:
        raise NodeError(f"log-level: no process {processes[0]!r}: expected one of {', '.join(sorted(names))}")
    if level.lower() not in (*log_levels.NAMES, DEFAULT):
        raise NodeError(f"log-level: expected one of {', '.join(log_levels.NAMES)}, {DEFAULT}, got {level!r}")


def _changed(levels: dict[str, str], process: str, level: str) -> dict[str, str]:
    """What is said of all, or of a group, goes over what was said of one before."""
    kept = {} if process == ALL else {key: value for key, value in levels.items() if key.partition(":")[0] != process}
    if level != DEFAULT:
        return {**kept, process: level}
    return {key: value for key, value in kept.items() if key != process}
