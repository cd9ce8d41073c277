"""`python -m procs.cli.disagg MODEL [flags]`: a prefill node, a decode node and one frontend on this machine, as one program.

The flags go to both nodes, those in PREFILL_ARGS and DECODE_ARGS to one. Ctrl-C or SIGTERM drains decode, which has the
streams, then prefill; a second one ends the streams. When a node ends by itself the other is drained, and the program fails.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from types import FrameType

from shared.prctl import signal_at_parents_death

POLL_SECONDS = 0.2
NODES = ("decode", "prefill")
"""In the order of their stop: streams of decode that have no cache yet still need prefill."""


def command(name: str, argv: list[str], environ: Mapping[str, str]) -> list[str]:
    """A node's command line. Of two equal flags the later wins, so ``argv`` can change any of these."""
    frontend = "--frontend" if name == "decode" else "--no-frontend"
    flags = ["--name", name, "--system-port", "0", frontend, "--disaggregation-mode", name]
    own = shlex.split(environ.get(f"{name.upper()}_ARGS", ""))
    return [sys.executable, "-m", "procs.cli", "serve", argv[0], *flags, *argv[1:], *own]


class Pair:
    """The two nodes, children with a process group each: the terminal's Ctrl-C reaches this program alone."""

    def __init__(self, commands: Mapping[str, list[str]], environ: Mapping[str, str]) -> None:
        self.commands = commands
        self.environ = environ
        self.nodes: dict[str, subprocess.Popen[str]] = {}
        self.signals = 0
        self.failed = False

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.signals += 1

    def run(self) -> int:
        """Until a signal or the end of a node, and until both have ended; the exit code."""
        for name in self.commands:
            self.nodes[name] = self._start(name)
        readers = [threading.Thread(target=_show, args=item, daemon=True) for item in self.nodes.items()]
        for reader in readers:
            reader.start()
        while not self.signals and all(node.poll() is None for node in self.nodes.values()):
            time.sleep(POLL_SECONDS)
        if self.signals:
            _say("stopping: decode finishes its streams, then prefill")
        else:
            self.failed = True
            name, code = next((name, node.returncode) for name, node in self.nodes.items() if node.returncode is not None)
            _say(f"{name} ended by itself (exit status {code}); stopping the other")
        for node in self.nodes.values():
            self._stop(node)
        for reader in readers:
            reader.join(timeout=1)
        return 1 if self.failed or any(node.returncode for node in self.nodes.values()) else 0

    def _start(self, name: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self.commands[name],
            env=dict(self.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,
            # No thread runs yet. Should this program be killed, the nodes drain and end.
            preexec_fn=lambda: signal_at_parents_death(signal.SIGTERM),  # noqa: PLW1509
        )

    def _stop(self, node: "subprocess.Popen[str]") -> None:
        """One SIGTERM for the node's own drain; a second one when the operator asks again."""
        sent = 0
        while node.poll() is None:
            if sent == 0 or (sent == 1 and self.signals + self.failed > 1):
                node.terminate()
                sent += 1
            time.sleep(POLL_SECONDS)


def _show(name: str, node: "subprocess.Popen[str]") -> None:
    assert node.stdout is not None
    for line in node.stdout:
        print(f"{name:<8}{line}", end="", flush=True)


def _say(text: str) -> None:
    print(f"disagg: {text}", flush=True)


@contextlib.contextmanager
def discovery(environ: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The nodes' environment. One store for both: DYN_FILE_KV if it is set, else a directory that goes with this program."""
    with tempfile.TemporaryDirectory(prefix="sgnode-disagg-") as place:
        # The cache goes from one to the other on this machine: no port of it needs to be open to others.
        yield {"DYN_FILE_KV": place, "SGLANG_HOST_IP": "127.0.0.1", **environ, "PYTHONUNBUFFERED": "1"}


def main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 0 if argv in (["-h"], ["--help"]) else 2
    with discovery(os.environ) as environ:
        pair = Pair({name: command(name, argv, environ) for name in NODES}, environ)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, pair.on_signal)
        return pair.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
