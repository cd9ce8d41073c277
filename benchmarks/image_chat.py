"""TTFT of chats about images of 1 MB and 16 MB: a node with its frontend, ``dynamo.sglang`` with its own, ``sgl.Engine`` alone.

usage: python -m benchmarks.image_chat [--sizes 1,16] [--rounds 7] [--record FILE] [-- FLAGS OF SGLANG]
All sides run at once on a tiny vision model and are asked in turns; every image is new to all of them. TTFT is from sending, or
from the call with the image's bytes, to the first of one token. ``seen`` is the same image again.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import aiohttp
from tokenizers import Tokenizer

from benchmarks.figures import quantile
from benchmarks.token_path import host, processes
from benchmarks.token_path.dynamo_side import DynamoSide
from benchmarks.token_path.http_side import HttpSide
from benchmarks.token_path.load import Request
from benchmarks.token_path.node_side import NodeSide
from benchmarks.token_path.side import MODEL, START_SECONDS, Failed, Place, Setup, Wanted, worker_flags
from benchmarks.token_path.stream import Http
from procs.cli.serve import CPU_DEFAULTS, has_gpu
from tests.harness import Node
from tests.media import noise, url

WORDS = "What is this?"
SIDES = ("engine", "dynamo", "sgnode")
ENVIRONMENT = {
    "DYN_MM_MAX_DATA_URL_MB": "64",  # 16 MB are 22 in base64
    "DYN_HTTP_BODY_LIMIT_MB": "192",
    "TORCHDYNAMO_DISABLE": "1",  # else the first images compile
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
CHECKED_TOKENS = 16


class Asked(Protocol):
    """A side that answers about an image."""

    def ttft(self, image: bytes) -> float:
        """Seconds."""

    def text(self, image: bytes, tokens: int) -> str:
        """A greedy answer."""

    def close(self) -> None:
        """End it."""


class Chat(Http):
    """``/v1/chat/completions`` about an image, its first token timed."""

    def __init__(self, session: aiohttp.ClientSession, address: str) -> None:
        super().__init__(session, address, MODEL)
        self._url = f"{address}/v1/chat/completions"

    def body(self, image: bytes, tokens: int, **more: Any) -> bytes:
        content = [{"type": "image_url", "image_url": {"url": url(image)}}, {"type": "text", "text": WORDS}]
        asked = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0}
        return json.dumps({**asked, "ignore_eos": True, **more}).encode()


class Served:
    """A side behind a frontend."""

    def __init__(self, side: HttpSide, runner: asyncio.Runner) -> None:
        self._side, self._runner = side, runner
        side.start()
        self._session = runner.run(self._open())
        self._chat = Chat(self._session, side._url)

    async def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))

    def ttft(self, image: bytes) -> float:
        body = self._chat.body(image, 1, stream=True, stream_options={"include_usage": True})
        return self._runner.run(self._first(body))

    async def _first(self, body: bytes) -> float:
        request = Request(0, asyncio.get_running_loop().time())
        await self._chat.run(body, request)
        return request.arrivals[0] - request.began

    def text(self, image: bytes, tokens: int) -> str:
        asked = urllib.request.Request(
            f"{self._side._url}/v1/chat/completions", self._chat.body(image, tokens), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"])

    def close(self) -> None:
        self._runner.run(self._session.close())
        self._side.close()


class Alone:
    """The side ``engine``: benchmarks.image_engine in a process."""

    def __init__(self, setup: Setup, place: Place) -> None:
        self._tokenizer = Tokenizer.from_file(str(setup.model / "tokenizer.json"))
        self._connection, theirs = multiprocessing.Pipe()
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.image_engine", str(theirs.fileno()), "--"]
        with (place.logs / "engine.log").open("wb") as out:
            self._process = subprocess.Popen(
                [*command, *worker_flags(Wanted("raw"), setup)],
                env=place.environment(),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        theirs.close()
        if not self._connection.poll(START_SECONDS) or self._connection.recv() != "up":
            raise Failed("the engine's process does not come up")

    def _ask(self, image: bytes, tokens: int) -> tuple[float, list[int]]:
        connection: Connection = self._connection
        connection.send((image, WORDS, tokens))
        answer: tuple[float, list[int]] = connection.recv()
        return answer

    def ttft(self, image: bytes) -> float:
        return self._ask(image, 1)[0]

    def text(self, image: bytes, tokens: int) -> str:
        return str(self._tokenizer.decode(self._ask(image, tokens)[1], skip_special_tokens=True))

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def started(kind: str, setup: Setup, logs: Path, runner: asyncio.Runner) -> Iterator[tuple[Asked, Place]]:
    """The side, up; ended on the way out."""
    with Place(logs / kind) as place:
        side: Asked
        match kind:
            case "engine":
                side = Alone(setup, place)
            case "dynamo":
                side = Served(DynamoSide(Wanted("dynamo"), setup, place), runner)
            case _:
                side = Served(NodeSide(Wanted("sgnode"), setup, place), runner)
        try:
            yield side, place
        finally:
            side.close()


def measure(sides: dict[str, tuple[Asked, Place]], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds by size and side, and CPU seconds an image by process."""
    alike = {kind: side.text(noise(20_000), CHECKED_TOKENS) for kind, (side, _) in sides.items()}
    if len(set(alike.values())) > 1:
        raise Failed(f"answers differ: {alike}")
    found: dict[str, Any] = {}
    for number in range(-1, options.rounds):  # the first warms up
        for size in options.sizes:
            image = noise(size << 20, seed=1000 * size + number + 1)
            order = list(sides) if number % 2 else list(sides)[::-1]
            for kind in order:
                side, place = sides[kind]
                before = processes.snapshot(place.mark)
                seconds = side.ttft(image)
                used = processes.cpu_between(before, processes.snapshot(place.mark))
                again = side.ttft(image)
                if number >= 0:
                    rows = found.setdefault(f"{size} MB", {}).setdefault(kind, {"new_s": [], "seen_s": [], "cpu_s": []})
                    rows["new_s"].append(round(seconds, 4))
                    rows["seen_s"].append(round(again, 4))
                    rows["cpu_s"].append({name: spent for name, spent in used.items() if spent})
    return found


def table(found: dict[str, Any]) -> str:
    """TTFT in ms: median [lowest, highest]; CPU of all processes of the side, the clients' not."""
    lines = [f"{'TTFT, ms':14}{'new':>24}{'seen':>24}{'CPU, ms':>10}"]
    for size, sides in found.items():
        for kind, rows in sides.items():
            cells = [
                f"{quantile(v, 0.5) * 1e3:.0f} [{min(v) * 1e3:.0f}, {max(v) * 1e3:.0f}]" for v in (rows["new_s"], rows["seen_s"])
            ]
            cpu = quantile([sum(each.values()) for each in rows["cpu_s"]], 0.5) * 1e3
            lines.append(f"{size + ' ' + kind:14}" + "".join(f"{cell:>24}" for cell in cells) + f"{cpu:>10.0f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda text: [int(each) for each in text.split(",")], default=[1, 16], help="MiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", type=Path, help="(a tiny vision model, made here)")
    parser.add_argument("--logs", type=Path, help="directory for the sides' logs")
    parser.add_argument("--record", type=Path, help="JSON file to write")
    parser.add_argument("flags", nargs="*", help="further flags of SGLang, after --")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    flags = [*options.flags, "--enable-multimodal", "--sleep-on-idle"]
    if not has_gpu():
        flags += [part for flag, values in CPU_DEFAULTS.items() if flag not in flags for part in (flag, *values)]
    with tempfile.TemporaryDirectory(prefix="sgn-model-") as made, asyncio.Runner() as runner, contextlib.ExitStack() as stack:
        model = options.model or Path(made) / "vision"
        if options.model is None:
            subprocess.run([Node.tool("sgnode"), "demo-model", str(model), "--vision"], check=True, stdout=subprocess.DEVNULL)
        setup = Setup(model, flags, agents=1, clients=0, step_seconds=0.0, vocab=256)
        logs = options.logs or Path(made) / "logs"
        sides = {kind: stack.enter_context(started(kind, setup, logs, runner)) for kind in SIDES}
        found = measure(sides, options)
        memory = {kind: processes.peak_rss(processes.snapshot(place.mark)) for kind, (_, place) in sides.items()}
    print(table(found))
    if options.record:
        document = {**host.header("benchmarks.image_chat"), "environment": ENVIRONMENT, "ttft": found, "peak_rss_mib": memory}
        options.record.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
