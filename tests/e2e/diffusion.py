"""Image and video nodes on tiny pipelines, and the DiffGenerator called directly that their answers are compared with.

``python -m tests.e2e.diffusion FLAGS OF python -m dynamo.sglang``: sampling parameters as JSON in, a file of each as base64 out.
"""

import asyncio
import base64
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from tests import marked
from tests.e2e.conftest import MODEL
from tests.frontend import free_port
from tests.harness import ONE_THREAD, SGNODE, Node

PROMPT = "a red fox"
SIZE = 256
STEPS = 4
FLAGS = {"image": "--image-diffusion-worker", "video": "--video-generation-worker"}
NAMES = {"image": "tiny-z-image", "video": "tiny-wan"}
PATHS = {"image": "images/generations", "video": "videos"}
SECONDS = 240.0


def pipeline(folder: Path, kind: str) -> Path:
    path = folder / NAMES[kind]
    subprocess.run([SGNODE, "demo-model", str(path), f"--{kind}"], check=True, capture_output=True, timeout=120)
    return path


def served(model: Path, kind: str, store: Path, *flags: str, env: dict[str, str] | None = None) -> Node:
    """It stores files under ``store``."""
    output = ["--media-output-fs-url", f"file://{store}"]
    environ = {**ONE_THREAD, **(env or {})}
    return Node(str(model), FLAGS[kind], "--served-model-name", MODEL, *output, *flags, env=environ)


def post(node: Node, kind: str, **body: Any) -> requests.Response:
    asked = {"model": MODEL, "prompt": PROMPT, "size": f"{SIZE}x{SIZE}", **body}
    return requests.post(f"{node.url}/v1/{PATHS[kind]}", json=asked, timeout=120)


def contents(answer: requests.Response) -> list[bytes]:
    """Files of an answer, wherever they are."""
    assert answer.status_code == 200, answer.text[:500]
    found = []
    for each in answer.json()["data"]:
        if each.get("b64_json"):
            found.append(base64.b64decode(each["b64_json"]))
        else:
            found.append(Path(each["url"].removeprefix("file://")).read_bytes())
    return found


class Later:
    """A call in a thread of its own, with its answer and when it came (monotonic seconds)."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.answer: Any = None
        self.ended = 0.0
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self.answer = call()
        except requests.RequestException as error:
            self.answer = error
        self.ended = time.monotonic()

    def join(self, seconds: float = 120.0) -> Any:
        self._thread.join(seconds)
        assert self.ended, "no answer"
        return self.answer


def runs(node: Node) -> bool:
    """SGLang is at a client's request: an agent has one, and no canary is before it."""
    return number(node, "inflight", "agent:0") == 1 and number(node, "running") == 1 and number(node, "waiting") == 0


def number(node: Node, name: str, process: str = "engine") -> float:
    """One of a process's numbers, as its node shows it; -1 while it shows none."""
    for line in requests.get(f"{node.system_url}/metrics", timeout=5).text.splitlines():
        if line.startswith(f"sgnode_{name}{{") and f'process="{process}"' in line:
            return float(line.rpartition(" ")[2])
    return -1.0


def direct(model: Path, kind: str, wanted: list[dict[str, Any]], temporary: Path) -> list[bytes]:
    """What a generator makes of these, that is started for them and ended afterwards."""
    environ = {**os.environ, **ONE_THREAD, "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1", "HOME": str(temporary)}
    arguments = ["--model-path", str(model), FLAGS[kind], "--discovery-backend", "file", "--nccl-port", str(free_port())]
    answers = marked.ask("tests.e2e.diffusion", arguments, wanted, environ, SECONDS)
    return [base64.b64decode(each) for each in answers]


def parameters(seed: int, guidance: float, **more: Any) -> dict[str, Any]:
    """SGLang's, for what ``post`` asks with that seed."""
    fixed = {"prompt": PROMPT, "negative_prompt": None, "height": SIZE, "width": SIZE, "save_output": False}
    return {**fixed, "num_inference_steps": STEPS, "guidance_scale": guidance, "seed": seed, **more}


def main() -> None:
    from dynamo.sglang.args import _diffusion_generator_kwargs, parse_args

    wanted = json.load(sys.stdin)
    parsed = asyncio.run(parse_args(sys.argv[1:]))
    from sglang.multimodal_gen import DiffGenerator

    from procs.engine.adapter.diffusion import files

    generator = DiffGenerator.from_pretrained(**_diffusion_generator_kwargs(parsed.server_args))
    answers = []
    for each in wanted:
        frames = generator.generate(sampling_params_kwargs=each).frames
        made = files.mp4(frames, each["fps"], lambda: None) if "num_frames" in each else files.png(frames[0])
        answers.append(base64.b64encode(made).decode())
    marked.answer(answers)
    generator.shutdown()


if __name__ == "__main__":
    main()
