"""What `sgnode serve` shows: progress until the node is ready, how to use it, then its changes. A child of supervisord."""

import http.client
import json
import os
import shlex
import signal
import sys
import time
import urllib.request
from typing import Any

from shared import config as configuration
from shared import supervisord
from shared.config import NodeConfig
from shared.prctl import signal_at_parents_death
from shared.state import State

POLL_SECONDS = 0.25
STILL_SECONDS = 10.0
"""A state that lasts is said again so often, with what it waits for."""
FRONTEND_SECONDS = 60.0
"""For the frontend to have the model; then it is said all the same how it would be used."""
PAIRED = {
    "prefill": "a decode worker",
    "decode": "a prefill worker",
    "mm_encode": "a worker with --dedicated-mm-encoder",
    "mm_worker": "an encode worker",
    "mm_prefill": "an encode and a decode worker",
    "mm_decode": "an encode and a prefill worker",
}
"""Roles that answer nobody alone, and with whom they do: a frontend does not list their model before."""

TRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "aggregated": (
        "chat/completions",
        {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32, "stream": True},
    ),
    "embedding": ("embeddings", {"input": "Hello"}),
    "rerank": ("rerank", {"query": "Hello", "documents": ["Hello, world", "Good night"]}),
    "image": ("images/generations", {"prompt": "a red fox", "size": "256x256", "nvext": {"num_inference_steps": 4}}),
    "video": (
        "videos",
        {
            "prompt": "a red fox",
            "size": "256x256",
            "seconds": 1,
            "nvext": {"fps": 8, "num_frames": 9, "num_inference_steps": 4},
        },
    ),
}
"""A request that a node of the role answers: path under /v1, body beside the model."""


def usage(config: NodeConfig) -> str:
    """The URL and a curl line that works as pasted."""
    system = _url(config.system_host, config.system_port)
    if not config.leads:
        where = f"rank {config.node_rank} of {config.nnodes}, rank 0 at {config.dist_init_addr} takes the requests"
        return f"the engine is up: {where}; health and metrics: {system}/health {system}/metrics"
    if not config.frontend:
        return f"serving {config.served_model_name} to the cluster; health and metrics: {system}/health {system}/metrics"
    url = _url(config.http_host, config.http_port)
    ready = f"ready: {url}/v1   (health: {system}/health, metrics: {system}/metrics)"
    if config.role in PAIRED:
        return f"{ready}\nit answers together with {PAIRED[config.role]}"
    path, more = TRIES.get(config.role, TRIES["aggregated"])
    body = shlex.quote(json.dumps({"model": config.served_model_name, **more}))
    return f"{ready}\ntry:   curl -sN {url}/v1/{path} -H 'Content-Type: application/json' -d {body}"


def _url(host: str, port: int) -> str:
    """A URL that reaches a server bound to that address from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def document(config: NodeConfig) -> dict[str, Any]:
    """The node's status; {} while supervisord does not answer."""
    try:
        found: dict[str, Any] = json.loads(supervisord.call(config.path, "sgnode.node", timeout=2.0))
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    return found


def answers(config: NodeConfig) -> bool:
    """The node's own frontend has the model: it reads the tokenizer after the registration, for seconds if it is a large one."""
    if not config.frontend or not config.leads or config.role in PAIRED:
        return True
    try:
        with urllib.request.urlopen(f"{_url(config.http_host, config.http_port)}/v1/models", timeout=2.0) as answer:
            return bool(json.load(answer)["data"])
    except (OSError, http.client.HTTPException, ValueError, KeyError):
        return False


def details(status: dict[str, Any]) -> str:
    """What an operator wants to know of a state that lasts."""
    rows = status.get("processes", [])
    draining = next((row["detail"] for row in rows if str(row.get("detail", "")).startswith("draining:")), "")
    reason = draining.removeprefix("draining: ") or status.get("reason", "")
    waiting = status.get("waiting_for", "")
    if status.get("state") == State.WAITING and not reason:
        return str(waiting)
    return f"{reason}{'; ' if reason and waiting else ''}{f'waiting for {waiting}' if waiting else ''}"


def main() -> int:
    parent = os.getppid()
    signal_at_parents_death(signal.SIGTERM)
    if os.getppid() != parent:
        return 0
    # Ctrl-C reaches the whole foreground group: supervisord drains, and this goes on to show it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = configuration.load()
    began = time.monotonic()
    shown, said_at, greeted = "", 0.0, False
    print(
        f"sgnode {config.version}: starting {config.served_model_name} ({config.role}), logs in {config.runtime_dir}/log",
        flush=True,
    )
    while os.getppid() == parent:
        status = document(config)
        state = status.get("state", "")
        now = time.monotonic()
        if state and (state != shown or (state != State.READY and now - said_at > STILL_SECONDS)):
            print(f"[{now - began:6.1f} s] {state}: {details(status)}".rstrip(": "), flush=True)
            shown, said_at = state, now
        if state == State.READY and not greeted and (answers(config) or now - said_at > FRONTEND_SECONDS):
            greeted = True
            print(usage(config), flush=True)
        time.sleep(POLL_SECONDS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
