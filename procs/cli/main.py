"""The `sgnode` command: finds the subcommand, prints an error as one line, exits 2."""

import os
import sys
from collections.abc import Callable
from importlib.metadata import version

from procs.plugin.notify import Notify
from shared.errors import NodeError

HELP = """\
usage: sgnode COMMAND [flags]

SGLang on a GPU server as a supervised node of a Dynamo cluster.

  serve [MODEL] [flags]   run a node in the foreground; takes every flag of `python -m dynamo.sglang`
  status [--json|--watch] its state, and each process's with what it waits for (exit 0 ready, 3 not running, 4 otherwise)
  drain | resume          leave discovery and let streams finish, engine up; serve again
  stop [--now]            drain it and stop it; returns when it is gone
  restart [PROCESS]       restart a process, or all behind a drain, without losing a stream
  sleep | wake            drain it and release its accelerator memory; take it again and serve
  log-level [PROCESS] [L] how much a process logs from now on, or all of them
  show-config             the configuration that it runs with
  doctor [serve's flags]  what would go wrong with a start, or is wrong with a running node, and what to do
  ctl ...                 supervisorctl on it: `sgnode ctl status`, `sgnode ctl restart agent`, `sgnode ctl tail -f engine`
  group-key FILE          make the key of a group of nodes
  install-unit            write sgnode@.service for systemd, with this installation's paths
  demo-model DIR          make a tiny model with random weights, to try a node without a download

All but serve, group-key, install-unit and demo-model find the node by --name or --runtime-dir, or take the only one that runs
(doctor does so when it gets no other flag).
`sgnode COMMAND --help` says more. `sgnode --version` prints the version.

  sgnode demo-model ./demo && sgnode serve ./demo
  sgnode serve Qwen/Qwen3-8B --tp-size 2"""


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Run a command line; the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"sgnode {version('sgnode')}")
        return 0
    try:
        return _command(argv[0], argv[1:])
    except NodeError as error:
        print(f"sgnode: error: {error}", file=sys.stderr)
        Notify().say(f"refused: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe has left (`sgnode status | head -1`); the interpreter shall not try to flush to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _command(name: str, argv: list[str]) -> int:
    from procs.cli import status

    match name:
        case "serve":
            from procs.cli import serve

            return serve.main(argv)
        case "status":
            return status.status(argv)
        case "drain" | "resume" | "stop" | "restart":
            from procs.cli import control

            command: Callable[[list[str]], int] = getattr(control, name)
            return command(argv)
        case "sleep" | "wake":
            from procs.cli import sleep

            return sleep.sleep(argv) if name == "sleep" else sleep.wake(argv)
        case "log-level":
            from procs.cli import log_level

            return log_level.main(argv)
        case "show-config":
            return status.show_config(argv)
        case "doctor":
            from procs.cli.doctor import command as doctor

            return doctor.main(argv)
        case "ctl":
            return status.ctl(argv)
        case "group-key":
            from procs.cli import group_key

            return group_key.main(argv)
        case "install-unit":
            from procs.cli import install_unit

            return install_unit.main(argv)
        case "demo-model":
            from procs.cli import demo_model

            return demo_model.main(argv)
    raise NodeError(f"unknown command {name!r}; `sgnode --help` lists them")
