"""SIGTERM on a real node with real streams running: all complete, nothing stays."""

import concurrent.futures
import json
import time
from pathlib import Path

import requests

from tests.e2e.conftest import MODEL
from tests.harness import CPU, Node, marked_pids, wait_for

STREAMS = 8
TOKENS = 2400
"""At 8 streams this engine gives each about 100 tokens/s on two cores, fewer as the context grows: well over 10 s."""


def stream(url: str, seed: int) -> tuple[int, str]:
    """Run one stream to its end: tokens by its usage, and its finish reason."""
    body = {
        "model": MODEL,
        "prompt": [20 + seed, 30, 40],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    tokens, finish = 0, ""
    with requests.post(f"{url}/v1/completions", json=body, stream=True, timeout=240) as answer:
        for line in answer.iter_lines():
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
            if chunk.get("choices") and chunk["choices"][0].get("finish_reason"):
                finish = chunk["choices"][0]["finish_reason"]
    return tokens, finish


def test_sigterm_with_streams_running_loses_none_and_leaves_nothing(model: Path) -> None:
    with Node(str(model), "--served-model-name", MODEL, *CPU) as node:
        temporary = node.root / "tmp"
        temporary.mkdir()
        node.environment["TMPDIR"] = str(temporary)
        node.start().wait_ready()
        url = node.url
        with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
            running = [pool.submit(stream, url, seed) for seed in range(STREAMS)]
            wait_for("8 streams in the engine", lambda: node.status().get("inflight") == STREAMS, 30)
            asked = time.monotonic()
            node.terminate()
            wait_for("model withdrawn", lambda: not _listed(url), 5, every=0.01)
            withdrawn = time.monotonic() - asked
            draining = wait_for("draining seen", lambda: node.status().get("state") == "draining", 10)
            results = [future.result() for future in running]
            lasted = time.monotonic() - asked
        assert draining
        assert results == [(TOKENS, "length")] * STREAMS
        assert lasted > 10, f"the streams had only {lasted:.1f} s to go, the test proves nothing"
        assert withdrawn < 2, f"withdrawn after {withdrawn:.2f} s"
        assert node.wait_stopped(30) == 0
        wait_for("no process left", lambda: not marked_pids(node.runtime_dir), 5)
        left = [p.relative_to(node.runtime_dir) for p in node.runtime_dir.rglob("*") if p.is_file() or p.is_socket()]
        assert all(path.parts[0] == "log" for path in left), left
        assert list(temporary.iterdir()) == []


def _listed(url: str) -> bool:
    answer = requests.get(f"{url}/v1/models", timeout=5)
    return bool(answer.json().get("data"))
