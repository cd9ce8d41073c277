"""``/engine/*`` and ``/v1/loras`` on the node's port: the statuses, types and bodies recorded of Dynamo 1.6.1's."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from procs.prober import routes as module
from procs.prober.routes import Routes, not_found
from shared.engine_client import EngineClient
from shared.errors import Code, RequestError

TEXT = "text/plain; charset=utf-8"
LOADED = {"status": "success", "message": "LoRA adapter 'l1' loaded successfully", "lora_name": "l1", "lora_id": 601409144}
BODY = {"lora_name": "l1", "source": {"uri": "file:///adapters/l1"}}
MAX_BODY = 1 << 20


class Engine:
    """Stands for EngineClient: remembers the controls and answers as told."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.answers: dict[str, Any] = {}

    async def control(self, op: str, args: dict[str, Any], seconds: float) -> Any:
        assert seconds == module.CONTROL_SECONDS
        self.asked.append((op, args))
        answer = self.answers.get(op, {"status": "ok"})
        if isinstance(answer, Exception):
            raise answer
        return answer


class Port(Engine):
    """The port over such an engine, and which adapters agents have in discovery."""

    client: TestClient[web.Request, web.Application]

    def __init__(self, *, loras: bool) -> None:
        super().__init__()
        self.adapters: set[str] = set()
        fake: EngineClient = self  # type: ignore[assignment]
        self.routes = Routes(fake, lambda: self.adapters, loras=loras)

    async def ask(self, method: str, path: str, body: Any = None, kind: str | None = None) -> tuple[int, str, Any]:
        """Status, content type, and the body: parsed when it is JSON."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {} if kind is None else {"Content-Type": kind}
        async with self.client.request(method, path, data=data, headers=headers, skip_auto_headers=["Content-Type"]) as answer:
            text = await answer.text()
            try:
                return answer.status, answer.headers.get("Content-Type", ""), json.loads(text)
            except ValueError:
                return answer.status, answer.headers.get("Content-Type", ""), text

    async def load(self, body: Any, kind: str = "application/json") -> tuple[int, str, Any]:
        return await self.ask("POST", "/v1/loras", body, kind)


@asynccontextmanager
async def port_with(*, loras: bool) -> AsyncIterator[Port]:
    port = Port(loras=loras)
    app = web.Application(middlewares=[not_found], client_max_size=MAX_BODY)
    port.routes.add(app)
    async with TestClient(TestServer(app)) as client:
        port.client = client
        yield port


def run(test: Callable[[Port], Awaitable[None]], *, loras: bool = True) -> None:
    async def main() -> None:
        async with port_with(loras=loras) as port:
            await test(port)

    asyncio.run(main())


# --- /engine -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_every_method_reaches_the_engine_with_its_body_whatever_the_content_type(method: str) -> None:
    async def test(port: Port) -> None:
        port.answers["route"] = {"status": "ok", "taints": ["a", "b"]}
        for kind in (None, "text/plain", "application/json"):
            found = await port.ask(method, "/engine/update/model_taints", {"taints": ["b", "a"]}, kind)
            assert found == (200, TEXT, {"status": "ok", "taints": ["a", "b"]})
        assert port.asked == [("route", {"path": "update/model_taints", "body": {"taints": ["b", "a"]}})] * 3

    run(test)


def test_head_has_the_status_and_no_body() -> None:
    async def test(port: Port) -> None:
        assert await port.ask("HEAD", "/engine/pause_generation") == (200, TEXT, "")
        port.answers["route"] = RequestError(Code.UNKNOWN, "no engine route 'nope'")
        assert (await port.ask("HEAD", "/engine/nope"))[0] == 404

    run(test)


@pytest.mark.parametrize(
    ("data", "body"), [(None, {}), (b"", {}), (b"{}", {}), (b"[1]", [1]), (b"null", None), (b'"x"', "x"), (b" 5 ", 5)]
)
def test_an_empty_body_is_an_empty_object_and_other_json_goes_through(data: bytes | None, body: Any) -> None:
    async def test(port: Port) -> None:
        assert (await port.ask("POST", "/engine/x", data))[0] == 200
        assert port.asked == [("route", {"path": "x", "body": body})]

    run(test)


@pytest.mark.parametrize("data", [b"{bad", b"{", b"  ", b"\xff\xfe", b'"\xff"', b"[" * 100_000, b"{} x"])
def test_what_is_no_json_never_reaches_the_engine(data: bytes) -> None:
    async def test(port: Port) -> None:
        status, kind, body = await port.ask("POST", "/engine/update/model_taints", data)
        assert (status, kind, body["error"]) == (400, TEXT, "Invalid JSON") and body["message"]
        assert body.keys() == {"error", "message"} and port.asked == []

    run(test)


@pytest.mark.parametrize("path", ["nope", "control/stop_profile/", "/control/stop_profile", "control/release_memory_occupation"])
def test_an_unknown_route_is_named_as_it_was_asked_for(path: str) -> None:
    async def test(port: Port) -> None:
        port.answers["route"] = RequestError(Code.UNKNOWN, "no engine route")
        assert await port.ask("POST", f"/engine/{path}", {}) == (
            404,
            TEXT,
            {"error": "Route not found", "message": f"Route /engine/{path} not found"},
        )
        assert port.asked[0][1]["path"] == path

    run(test)


@pytest.mark.parametrize("path", ["/engine", "/engine/", "/", "/nope", "/v1/loras/"])
def test_a_path_that_isn_t_there_is_said_in_plain_text(path: str) -> None:
    async def test(port: Port) -> None:
        for method in ("GET", "POST", "DELETE"):
            assert await port.ask(method, path) == (404, TEXT, "Route not found")
        assert port.asked == []

    run(test)


@pytest.mark.parametrize(
    "message",
    [
        "ValueError: 'taints' must be a JSON array of strings",
        "RuntimeError: Profiling is not in progress. Call /start_profile first.",
        "TypeError: Missing required argument 'model_path'",
    ],
)
def test_an_exception_of_the_engine_is_a_handler_error_with_its_words(message: str) -> None:
    async def test(port: Port) -> None:
        port.answers["route"] = RequestError(Code.INTERNAL, message)
        assert await port.ask("POST", "/engine/x", {}) == (
            500,
            TEXT,
            {"error": "Handler error", "message": f"Python callback failed: {message}"},
        )

    run(test)


def test_without_an_engine_it_is_unavailable() -> None:
    async def test(port: Port) -> None:
        port.answers["route"] = RequestError(Code.ENGINE_DEAD, "no engine is up")
        assert await port.ask("POST", "/engine/x", {}) == (
            503,
            TEXT,
            {"error": "Engine not available", "message": "no engine is up"},
        )

    run(test)


def test_a_body_past_the_limit_is_refused_in_dynamo_s_words() -> None:
    async def test(port: Port) -> None:
        found = await port.ask("POST", "/engine/x", b'"' + b"a" * MAX_BODY + b'"')
        assert found == (413, TEXT, "Failed to buffer the request body: length limit exceeded")
        assert port.asked == []

    run(test)


# --- /v1/loras -----------------------------------------------------------------------------------------------------------


def test_without_dyn_lora_enabled_there_are_no_adapters() -> None:
    async def test(port: Port) -> None:
        assert await port.ask("GET", "/v1/loras") == (404, TEXT, "Route not found")
        assert (await port.load(BODY))[0] == 404

    run(test, loras=False)


def test_the_list_is_the_engine_s() -> None:
    async def test(port: Port) -> None:
        port.answers["list_loras"] = {"status": "success", "loras": {"l1": 601409144}, "count": 1}
        assert await port.ask("GET", "/v1/loras") == (200, "application/json", port.answers["list_loras"])
        port.answers["list_loras"] = RequestError(Code.ENGINE_DEAD, "no engine is up")
        assert await port.ask("GET", "/v1/loras") == (
            500,
            "application/json",
            {"status": "error", "message": "no engine is up"},
        )

    run(test)


def test_a_load_is_answered_when_an_agent_has_the_adapter_in_discovery() -> None:
    async def test(port: Port) -> None:
        port.answers["load_lora"] = LOADED
        loading = asyncio.create_task(port.load(BODY))
        while not port.asked:  # noqa: ASYNC110 - the fake has no event for it
            await asyncio.sleep(0)
        port.adapters = {"other"}
        port.routes.hear()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not loading.done()
        port.adapters = {"other", "l1"}
        port.routes.hear()
        assert await loading == (200, "application/json", LOADED)
        assert port.asked == [("load_lora", {"body": BODY})]

    run(test)


def test_a_load_that_no_agent_follows_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FOLLOW_SECONDS", 0.05)

    async def test(port: Port) -> None:
        port.answers["load_lora"] = LOADED
        status, kind, body = await port.load(BODY)
        assert (status, kind, body["status"], body["lora_name"]) == (500, "application/json", "error", "l1")
        assert body["message"].startswith("Failed to register LoRA 'l1' in discovery registry: ")
        assert port.asked[1:] == [("unload_lora", {"body": {"lora_name": "l1"}})]

    run(test)


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_a_load_without_a_json_content_type_is_415(kind: str) -> None:
    async def test(port: Port) -> None:
        found = await port.ask("POST", "/v1/loras", BODY, kind or None)
        assert found == (415, TEXT, "Expected request with `Content-Type: application/json`") and port.asked == []

    run(test)


@pytest.mark.parametrize("data", [b"{bad", b"", b"\xff", b"[" * 100_000])
def test_a_load_that_is_no_json_is_400(data: bytes) -> None:
    async def test(port: Port) -> None:
        status, kind, text = await port.load(data)
        assert (status, kind) == (400, TEXT) and text.startswith("Failed to parse the request body as JSON: ")
        assert port.asked == []

    run(test)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "lora_name"),
        ({"lora_name": "l1"}, "source"),
        ({"lora_name": "l1", "source": {}}, "uri"),
        ({"lora_name": "l1", "source": "file:///x"}, "source"),
        ({"lora_name": 5, "source": {"uri": "x"}}, "lora_name"),
        ({"lora_name": "l1", "source": {"uri": None}}, "uri"),
        ([1], "object"),
        (None, "object"),
    ],
)
def test_a_load_with_a_missing_or_wrong_field_is_422_and_names_it(body: Any, named: str) -> None:
    async def test(port: Port) -> None:
        status, kind, text = await port.load(json.dumps(body).encode())
        assert (status, kind) == (422, TEXT) and named in text
        assert text.startswith("Failed to deserialize the JSON body into the target type: ") and port.asked == []

    run(test)


@pytest.mark.parametrize(
    "message",
    [
        "'lora_name' is required in request",
        "Failed to download LoRA: Download failed: Local LoRA not found: file:///nope",
        "SGLang failed to load LoRA adapter 'l1': [Errno 2] No such file or directory",
    ],
)
def test_a_load_that_the_engine_refuses_is_500_with_its_words_and_nothing_is_undone(message: str) -> None:
    async def test(port: Port) -> None:
        port.answers["load_lora"] = {"status": "error", "message": message}
        assert await port.load(BODY) == (500, "application/json", {"status": "error", "message": message})
        assert len(port.asked) == 1
        port.answers["load_lora"] = RequestError(Code.INTERNAL, message)
        assert await port.load(BODY) == (500, "application/json", {"status": "error", "message": message})

    run(test)


@pytest.mark.parametrize(("path", "name"), [("l1", "l1"), ("org/l2", "org/l2"), ("org%2Fl2", "org/l2")])
def test_an_adapter_is_unloaded_by_its_name_with_or_without_a_slash(path: str, name: str) -> None:
    async def test(port: Port) -> None:
        done = {"status": "success", "message": f"LoRA adapter '{name}' unloaded successfully", "lora_name": name, "lora_id": 7}
        port.answers["unload_lora"] = done
        assert await port.ask("DELETE", f"/v1/loras/{path}") == (200, "application/json", done)
        assert port.asked == [("unload_lora", {"body": {"lora_name": name}})]

    run(test)


def test_an_unknown_adapter_is_500_with_those_that_there_are() -> None:
    async def test(port: Port) -> None:
        port.answers["unload_lora"] = {"status": "error", "message": "LoRA adapter 'zzz' not found. Available LoRAs: ['l1']"}
        assert await port.ask("DELETE", "/v1/loras/zzz") == (500, "application/json", port.answers["unload_lora"])

    run(test)


@pytest.mark.parametrize(("method", "path"), [("DELETE", "/v1/loras"), ("PUT", "/v1/loras"), ("GET", "/v1/loras/l1")])
def test_a_method_that_isn_t_there_is_405_with_no_words(method: str, path: str) -> None:
    async def test(port: Port) -> None:
        status, _, text = await port.ask(method, path)
        assert (status, text) == (405, "") and port.asked == []

    run(test)
