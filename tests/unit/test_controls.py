"""The agent's endpoints beside ``generate``: adapters follow the engine into discovery, or leave it again."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from procs.agent.controls import LOAD_SECONDS, Controls
from shared.engine_client import EngineClient
from shared.errors import Code, RequestError

LOADED = {"status": "success", "message": "LoRA adapter 'a' loaded successfully", "lora_name": "a", "lora_id": 7}
UNLOADED = {"status": "success", "message": "LoRA adapter 'a' unloaded successfully", "lora_name": "a", "lora_id": 7}
BODY = {"lora_name": "a", "source": {"uri": "file:///x"}}


class Scene:
    """An engine that answers as told, and a discovery that remembers or refuses."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.calls: list[Any] = []
        self.refusal: Exception | None = None
        fake: EngineClient = self  # type: ignore[assignment]
        self.controls = Controls(fake, self._publish, self._revoke)

    async def control(self, op: str, args: dict[str, Any], seconds: float) -> Any:
        assert seconds == LOAD_SECONDS
        self.calls.append((op, args))
        answer = self.answers[op]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _publish(self, name: str, number: int) -> None:
        self.calls.append(("publish", name, number))
        if self.refusal is not None:
            raise self.refusal

    async def _revoke(self, name: str) -> None:
        self.calls.append(("revoke", name))
        if self.refusal is not None:
            raise self.refusal

    def ask(self, endpoint: str, request: Any = None) -> dict[str, Any]:
        """As Dynamo calls it: the request, and the context by its name."""

        async def collect(chunks: AsyncIterator[dict[str, Any]]) -> list[dict[str, Any]]:
            return [chunk async for chunk in chunks]

        (answer,) = asyncio.run(collect(self.controls.endpoints[endpoint](request, context=object())))
        return answer


def test_the_endpoints_are_the_incumbent_s() -> None:
    assert set(Scene().controls.endpoints) == {"load_lora", "unload_lora", "list_loras", "clear_kv_blocks"}


def test_a_loaded_adapter_s_card_is_published_before_the_answer() -> None:
    scene = Scene(load_lora=LOADED)
    assert scene.ask("load_lora", BODY) == LOADED
    assert scene.calls == [("load_lora", {"body": BODY}), ("publish", "a", 7)]


@pytest.mark.parametrize("refusal", [RuntimeError("a different model 'a' is already registered there"), TimeoutError()])
def test_an_adapter_whose_card_discovery_refuses_is_unloaded_again(refusal: Exception) -> None:
    scene = Scene(load_lora=LOADED, unload_lora=UNLOADED)
    scene.refusal = refusal
    assert scene.ask("load_lora", BODY) == {
        "status": "error",
        "message": f"Failed to register LoRA 'a' in discovery registry: {refusal}",
        "lora_name": "a",
    }
    assert scene.calls[2:] == [("unload_lora", {"body": {"lora_name": "a"}})]


def test_the_failure_is_told_though_the_unloading_fails_as_well() -> None:
    scene = Scene(load_lora=LOADED, unload_lora=RequestError(Code.ENGINE_DEAD, "no engine is up"))
    scene.refusal = RuntimeError("no")
    assert scene.ask("load_lora", BODY)["message"] == "Failed to register LoRA 'a' in discovery registry: no"


@pytest.mark.parametrize("request_", [None, {}, [1], "x"])
def test_what_the_engine_refuses_is_its_answer_and_discovery_hears_nothing(request_: Any) -> None:
    refused = {"status": "error", "message": "'lora_name' is required in request"}
    scene = Scene(load_lora=refused, unload_lora=refused)
    for endpoint in ("load_lora", "unload_lora"):
        assert scene.ask(endpoint, request_) == refused
    assert [call[0] for call in scene.calls] == ["load_lora", "unload_lora"]
    assert scene.calls[0][1] == {"body": request_}


def test_an_unloaded_adapter_s_card_is_taken_out() -> None:
    scene = Scene(unload_lora=UNLOADED)
    assert scene.ask("unload_lora", {"lora_name": "a"}) == UNLOADED
    assert scene.calls[1:] == [("revoke", "a")]


def test_a_card_that_stays_is_an_error_and_the_adapter_is_not_loaded_again() -> None:
    scene = Scene(unload_lora=UNLOADED)
    scene.refusal = RuntimeError("no")
    assert scene.ask("unload_lora", {"lora_name": "a"}) == {
        "status": "error",
        "message": "Failed to unregister LoRA 'a' from discovery registry: no",
        "lora_name": "a",
    }
    assert [call[0] for call in scene.calls] == ["unload_lora", "revoke"]


@pytest.mark.parametrize("endpoint", ["load_lora", "unload_lora", "list_loras", "clear_kv_blocks"])
def test_without_an_engine_every_endpoint_answers_with_an_error(endpoint: str) -> None:
    scene = Scene(**{endpoint: RequestError(Code.ENGINE_DEAD, "no engine is up")})
    assert scene.ask(endpoint) == {"status": "error", "message": "no engine is up"}
    assert len(scene.calls) == 1


@pytest.mark.parametrize("endpoint", ["list_loras", "clear_kv_blocks"])
def test_what_only_looks_or_flushes_is_passed_on_as_it_is(endpoint: str) -> None:
    scene = Scene(**{endpoint: {"status": "success", "message": "KV cache cleared"}})
    assert scene.ask(endpoint, {"x": 1}) == {"status": "success", "message": "KV cache cleared"}
    assert scene.calls == [(endpoint, {"body": {"x": 1}})]
