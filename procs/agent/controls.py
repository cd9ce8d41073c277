"""Dynamo's worker endpoints beside ``generate``: adapters and the KV cache, answered as dynamo.sglang 1.6.1 does."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from shared.engine_client import EngineClient
from shared.errors import RequestError

LOAD_SECONDS = 600.0
"""For one adapter: it may be fetched from a store first."""


class Controls:
    """``publish`` puts an adapter's card into discovery, ``revoke`` takes it out; both raise when discovery doesn't."""

    def __init__(
        self,
        client: EngineClient,
        publish: Callable[[str, int], Awaitable[None]],
        revoke: Callable[[str], Awaitable[None]],
    ) -> None:
        self._client = client
        self._publish = publish
        self._revoke = revoke

    @property
    def endpoints(self) -> dict[str, Callable[..., AsyncIterator[dict[str, Any]]]]:
        """Handlers by endpoint name; Dynamo passes the request, and the context by its name."""
        return {
            "load_lora": self.load_lora,
            "unload_lora": self.unload_lora,
            "list_loras": self.list_loras,
            "clear_kv_blocks": self.clear_kv_blocks,
        }

    async def load_lora(self, request: Any = None, context: Any = None) -> AsyncIterator[dict[str, Any]]:
        """``{lora_name, source: {uri}}``. An adapter whose card can't be published is unloaded again."""
        answer = await self._ask("load_lora", request)
        if answer.get("status") == "success":
            name = answer["lora_name"]
            try:
                await self._publish(name, answer["lora_id"])
            except Exception as error:
                logging.exception("the card of adapter %s", name)
                await self._ask("unload_lora", {"lora_name": name})
                message = f"Failed to register LoRA '{name}' in discovery registry: {error}"
                answer = {"status": "error", "message": message, "lora_name": name}
        yield answer

    async def unload_lora(self, request: Any = None, context: Any = None) -> AsyncIterator[dict[str, Any]]:
        """``{lora_name}``."""
        answer = await self._ask("unload_lora", request)
        if answer.get("status") == "success":
            name = answer["lora_name"]
            try:
                await self._revoke(name)
            except Exception as error:  # it is tried again: the engine doesn't have the adapter any more
                logging.exception("the card of adapter %s", name)
                message = f"Failed to unregister LoRA '{name}' from discovery registry: {error}"
                answer = {"status": "error", "message": message, "lora_name": name}
        yield answer

    async def list_loras(self, request: Any = None, context: Any = None) -> AsyncIterator[dict[str, Any]]:
        yield await self._ask("list_loras", request)

    async def clear_kv_blocks(self, request: Any = None, context: Any = None) -> AsyncIterator[dict[str, Any]]:
        """Flush SGLang's cache when nothing runs."""
        yield await self._ask("clear_kv_blocks", request)

    async def _ask(self, op: str, body: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = await self._client.control(op, {"body": body}, LOAD_SECONDS)
        except RequestError as error:
            return {"status": "error", "message": error.message}
        return answer
