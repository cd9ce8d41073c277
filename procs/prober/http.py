"""The node's one HTTP port: /live, /health, /ready, /metrics. Shapes as Dynamo 1.6.1's system status server."""

import time
from typing import Protocol

from aiohttp import web

from procs.prober.metrics import Metrics
from shared.config import NodeConfig
from shared.errors import NodeError


class Node(Protocol):
    """What the answers depend on."""

    want: str

    @property
    def healthy(self) -> bool: ...

    @property
    def failed_reason(self) -> str: ...


async def start(config: NodeConfig, node: Node, metrics: Metrics) -> web.AppRunner:
    """Bind the port and serve. Raises NodeError naming the flag when it can't be bound."""
    started = time.monotonic()

    async def live(_: web.Request) -> web.Response:
        # True while a large model loads, and in a drain: only a node that has given up should be replaced.
        return web.Response(status=503, text=node.failed_reason) if node.failed_reason else web.Response(text="live")

    async def health(_: web.Request) -> web.Response:
        word = "ready" if node.healthy else "notready"
        seconds = time.monotonic() - started
        uptime = {"secs": int(seconds), "nanos": int(seconds % 1 * 1e9)}
        body = {"status": word, "uptime": uptime, "endpoints": {config.dynamo.endpoint: word}}
        return web.json_response(body, status=200 if node.healthy else 503)

    async def ready(_: web.Request) -> web.Response:
        fine = node.healthy and node.want == "serve"
        return web.Response(status=200 if fine else 503, text="ready" if fine else "not ready")

    async def scrape(_: web.Request) -> web.Response:
        try:
            return web.Response(text=await metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
        except TimeoutError:
            return web.Response(status=503, text="the relay does not answer")

    app = web.Application()
    app.add_routes([web.get("/live", live), web.get("/health", health), web.get("/ready", ready), web.get("/metrics", scrape)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, config.system_host, config.system_port).start()
    except OSError as error:
        await runner.cleanup()
        raise NodeError(f"--system-port {config.system_port}: {error.strerror}; pass another port, or 0") from error
    return runner
