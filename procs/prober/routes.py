"""``/engine/*`` and ``/v1/loras`` on the node's HTTP port: statuses and bodies as Dynamo 1.6.1's system status server's."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from shared.engine_client import EngineClient
from shared.errors import Code, RequestError

CONTROL_SECONDS = 3600.0
"""For one control: weights may come over a slow disk."""
FOLLOW_SECONDS = 30.0
"""For an agent to have an adapter in discovery after the engine has it."""
TEXT = "text/plain"
"""Dynamo 1.6.1 calls its JSON so."""


class Routes:
    """``adapters``: which adapters some agent has in discovery. ``loras``: DYN_LORA_ENABLED."""

    def __init__(self, client: EngineClient, adapters: Callable[[], set[str]], *, loras: bool) -> None:
        self._client = client
        self._adapters = adapters
        self._loras = loras
        self._heard = asyncio.Event()

    def hear(self) -> None:
        """An agent has said something."""
        self._heard.set()

    def add(self, app: web.Application) -> None:
        app.router.add_route("*", "/engine/{path:.+}", self.engine)
        if self._loras:
            app.add_routes([web.get("/v1/loras", self.list), web.post("/v1/loras", self.load)])
            app.router.add_delete("/v1/loras/{name:.+}", self.unload)

    async def engine(self, request: web.Request) -> web.Response:
        """Any method; an empty body is ``{}``."""
        path = request.match_info["path"]
        data = await request.read()
        try:
            body = msgspec.json.decode(data) if data else {}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return _text(400, {"error": "Invalid JSON", "message": str(error)})
        try:
            answer = await self._client.control("route", {"path": path, "body": body}, CONTROL_SECONDS)
        except RequestError as error:
            if error.code == Code.UNKNOWN:
                return _text(404, {"error": "Route not found", "message": f"Route /engine/{path} not found"})
            if error.code == Code.ENGINE_DEAD:
                return _text(503, {"error": "Engine not available", "message": error.message})
            return _text(500, {"error": "Handler error", "message": f"Python callback failed: {error.message}"})
        return _text(200, answer)

    async def list(self, _: web.Request) -> web.Response:
        return _json(await self._ask("list_loras", None))

    async def load(self, request: web.Request) -> web.Response:
        """``{lora_name, source: {uri}}``; answered when an agent has its card in discovery, undone when none gets it there."""
        if request.content_type != "application/json":
            return web.Response(status=415, text="Expected request with `Content-Type: application/json`")
        try:
            body = json.loads(await request.read())
        except (ValueError, RecursionError) as error:
            return web.Response(status=400, text=f"Failed to parse the request body as JSON: {error}")
        try:
            msgspec.convert(body, LoadLora)
        except msgspec.ValidationError as error:
            return web.Response(status=422, text=f"Failed to deserialize the JSON body into the target type: {error}")
        answer = await self._ask("load_lora", body)
        if answer.get("status") == "success" and not await self._followed(body["lora_name"]):
            await self._ask("unload_lora", {"lora_name": body["lora_name"]})
            why = f"no agent has it after {FOLLOW_SECONDS:.0f} s"
            message = f"Failed to register LoRA '{body['lora_name']}' in discovery registry: {why}"
            answer = {"status": "error", "message": message, "lora_name": body["lora_name"]}
        return _json(answer)

    async def unload(self, request: web.Request) -> web.Response:
        return _json(await self._ask("unload_lora", {"lora_name": request.match_info["name"]}))

    async def _ask(self, op: str, body: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = await self._client.control(op, {"body": body}, CONTROL_SECONDS)
        except RequestError as error:
            return {"status": "error", "message": error.message}
        return answer

    async def _followed(self, name: str) -> bool:
        try:
            async with asyncio.timeout(FOLLOW_SECONDS):
                while name not in self._adapters():
                    self._heard.clear()
                    await self._heard.wait()
        except TimeoutError:
            return False
        return True


class Source(msgspec.Struct):
    """Where an adapter comes from."""

    uri: str


class LoadLora(msgspec.Struct):
    """The body of POST /v1/loras."""

    lora_name: str
    source: Source


def _text(status: int, body: dict[str, Any]) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(body), content_type=TEXT, charset="utf-8")


def _json(answer: dict[str, Any]) -> web.Response:
    status = 200 if answer.get("status") == "success" else 500
    return web.Response(status=status, body=msgspec.json.encode(answer), content_type="application/json")


@web.middleware
async def not_found(request: web.Request, handler: Any) -> web.StreamResponse:
    """Dynamo's words for what aiohttp has words of its own for."""
    try:
        response: web.StreamResponse = await handler(request)
    except web.HTTPNotFound:
        return web.Response(status=404, text="Route not found")
    except web.HTTPMethodNotAllowed as error:
        return web.Response(status=405, headers={"Allow": error.headers["Allow"]})
    except web.HTTPRequestEntityTooLarge:
        return web.Response(status=413, text="Failed to buffer the request body: length limit exceeded")
    return response
