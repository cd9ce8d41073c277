"""`sgnode status --watch` on a terminal, through a node's life: load, streams, death, a supervisord that hangs, the end."""

import re
import signal
import subprocess
from collections.abc import Callable

from tests.harness import Node, running, send, wait_for
from tests.node.conftest import MODEL
from tests.streams import FOREVER, Streams
from tests.terminal import Terminal

STEP_SECONDS = 0.02
COUNT = 16


def number(line: str, name: str) -> float:
    """The figure behind a word of the picture; -1 when it is not there."""
    found = re.search(rf"{re.escape(name)} +([\d,.]+)", line)
    return float(found[1].replace(",", "")) if found else -1.0


def test_a_nodes_life_on_a_terminal(make_node: Callable[..., Node], streams: Streams) -> None:
    node = make_node("--agents", "2", dials=f"step_seconds={STEP_SECONDS},load_seconds=1")
    command = node.sgnode_command("status", "--watch", "0.2")
    with Terminal(command, node.environment, columns=100, lines=30) as seen:
        wait_for("it waits for a node", lambda: "no node is running" in seen.text, 20)
        node.start()
        wait_for("the load", lambda: "loading" in seen.line("node test:"), 30)
        node.wait_ready(40)
        wait_for("ready", lambda: seen.line("node test: ready"), 10)
        assert seen.line("agent:1").split()[2] == "ready"

        streams.flowing(streams.start(node.url, MODEL, COUNT, FOREVER))
        running(node, COUNT)
        wanted = COUNT / STEP_SECONDS
        wait_for("the streams", lambda: number(seen.line("streams"), "streams") == COUNT, 5)
        wait_for("their rate", lambda: 0.7 * wanted < number(seen.line("streams"), "tokens/s") < 1.1 * wanted, 10)
        wait_for("their latencies", lambda: 0.8 < number(seen.line("TTFT"), "ITL p50") / (STEP_SECONDS * 1e3) < 2, 10)
        wait_for("KV use", lambda: re.search(r"\d% +\d+ of [\d,]+ blocks", seen.line("KV use")), 5)
        print(seen.text)

        seen.resize(70, 20)
        wait_for("the picture fits", lambda: seen.line("q leaves") and seen.line("agent:1") and seen.line("streams"), 5)

        send(node.pid("engine"), signal.SIGKILL)
        wait_for("the death", lambda: "killed by SIGKILL" in seen.text, 10)
        wait_for("no streams", lambda: number(seen.line("streams"), "streams") == 0, 10)
        node.wait_ready(40)
        wait_for("ready again", lambda: seen.line("node test: ready") and "load took" not in seen.text, 10)

        assert node.process is not None
        send(node.process.pid, signal.SIGSTOP)
        wait_for("a supervisord that hangs is said", lambda: "no answer from supervisord for 3 s" in seen.text, 10)
        assert seen.line("node test: ready"), "what was known stays"
        send(node.process.pid, signal.SIGCONT)
        wait_for("and when it goes on", lambda: "no answer" not in seen.text, 10)

        node.terminate()
        wait_for("the end", lambda: "no node is running" in seen.text, 30)
        assert node.wait_stopped() == 0 and seen.process.poll() is None
        seen.press("\x03")
        assert seen.process.wait(5) == 3
        assert seen.echoes() and b"\x1b[?1049l" in seen.raw, "the terminal is as it was"


def test_q_ends_it_with_the_code_of_status_and_a_pipe_gets_plain_text(make_node: Callable[..., Node]) -> None:
    node = make_node("--no-frontend").start().wait_ready(40)
    command = node.sgnode_command("status", "--watch", "0.1")
    with Terminal(command, {**node.environment, "NO_COLOR": "1"}) as seen:
        wait_for("ready", lambda: seen.line("node test: ready"), 20)
        assert seen.line("q leaves")
        seen.press("q")
        assert seen.process.wait(5) == 0
    # A shell's background would hand on to ignore SIGINT.
    piped = subprocess.Popen(["env", "--default-signal=INT", *command], env=node.environment, stdout=subprocess.PIPE, text=True)
    assert piped.stdout is not None
    heads = 0
    while heads < 2:
        line = piped.stdout.readline()
        assert line and "\x1b" not in line
        heads += line.startswith("node test: ready")
    piped.send_signal(signal.SIGINT)
    assert piped.wait(5) == 0
    piped.stdout.close()
