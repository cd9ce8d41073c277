"""The node's one HTTP port: /live, /health, /ready, /metrics; controls are in routes. Shapes as Dynamo 1.6.1's system server."""

import time
from typing import Protocol

from aiohttp import web

from procs.prober.metrics import Metrics
from procs.prober.routes import Routes, not_found
from shared.config import NodeConfig
from shared.errors import NodeError
from shared.sockets import REQUEST_MAX_BYTES

MAX_BODY = REQUEST_MAX_BYTES
"""Bytes of a request's body: what the engine's socket takes."""


class Node(Protocol):
    """What the answers depend on."""

    want: str

    @property
    def healthy(self) -> bool: ...

    @property
    def judged(self) -> bool: ...

    @property
    def endpoints(self) -> list[str]: ...

    @property
    def failed_reason(self) -> str: ...


async def start(config: NodeConfig, node: Node, metrics: Metrics, routes: Routes) -> web.AppRunner:
    """Bind the port and serve. Raises NodeError naming the flag when it can't be bound."""
    started = time.monotonic()

    async def live(_: web.Request) -> web.Response:
        # True while a large model loads, and in a drain: only a node that has given up should be replaced.
        return web.Response(status=503, text=node.failed_reason) if node.failed_reason else web.Response(text="live")

    async def health(_: web.Request) -> web.Response:
        # DYN_SYSTEM_STARTING_HEALTH_STATUS is the word for a node that has no engine yet, as in Dynamo.
        fine = node.healthy or (config.starting_status == "ready" and not node.judged and not node.failed_reason)
        word = "ready" if fine else "notready"
        seconds = time.monotonic() - started
        uptime = {"secs": int(seconds), "nanos": int(seconds % 1 * 1e9)}
        body = {"status": word, "uptime": uptime, "endpoints": dict.fromkeys(node.endpoints, word)}
        return web.json_response(body, status=200 if fine else 503)

    async def ready(_: web.Request) -> web.Response:
        fine = node.healthy and node.want == "serve"
        return web.Response(status=200 if fine else 503, text="ready" if fine else "not ready")

    async def scrape(_: web.Request) -> web.Response:
        try:
            return web.Response(text=await metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
        except TimeoutError:
            return web.Response(status=503, text="the relay does not answer")

    async def metadata(_: web.Request) -> web.Response:
        return web.Response(status=404, text="Discovery metadata not available")

    app = web.Application(middlewares=[not_found], client_max_size=MAX_BODY)
    routes.add(app)
    app.add_routes(
        [
            *(web.get(path, live) for path in {"/live", config.live_path} - {config.health_path}),
            *(web.get(path, health) for path in {"/health", config.health_path} - {config.live_path}),
            web.get("/ready", ready),
            web.get("/metrics", scrape),
            web.get("/metadata", metadata),
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, config.system_host, config.system_port).start()
    except OSError as error:
        await runner.cleanup()
        raise NodeError(f"--system-port {config.system_port}: {error.strerror}; pass another port, or 0") from error
    return runner
