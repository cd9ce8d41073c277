"""Engine controls on a stand-in engine: routes by path, the guard of its memory, taints, adapters that outlive an engine."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dynamo.sglang.request_handlers import handler_base

from procs.engine.adapter.routes import Routes
from shared.errors import Code, RequestError
from shared.frames import Serving

INCARNATION = 3


class Manager:
    """SGLang's tokenizer manager, as far as controls go: remembers, and fails or hangs as told."""

    tokenizer = None

    def __init__(self) -> None:
        self.rid_to_state: dict[str, Any] = {}
        self.is_pause = False
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.failing: set[str] = set()
        self.gate: asyncio.Event | None = None
        self.loops = 0
        self.lora_fails = ""

    def auto_create_handle_loop(self) -> None:
        self.loops += 1

    async def _call(self, name: str, arguments: dict[str, Any]) -> None:
        self.calls.append((name, arguments))
        if self.gate is not None:
            await self.gate.wait()
        if name in self.failing:
            raise RuntimeError(f"{name} failed")

    async def pause_generation(self, **arguments: Any) -> None:
        await self._call("pause", arguments)
        self.is_pause = True

    async def continue_generation(self, **arguments: Any) -> None:
        await self._call("continue", arguments)
        self.is_pause = False

    async def release_memory_occupation(self, **arguments: Any) -> None:
        await self._call("release", arguments)

    async def resume_memory_occupation(self, **arguments: Any) -> None:
        await self._call("resume", arguments)

    async def load_lora_adapter(self, request: Any) -> Any:
        await self._call("load", {"name": request.lora_name, "path": request.lora_path})
        return SimpleNamespace(success=request.lora_name != self.lora_fails, error_message="no such rank")

    async def unload_lora_adapter(self, request: Any) -> Any:
        await self._call("unload", {"name": request.lora_name})
        return SimpleNamespace(success=True, error_message="")

    async def get_server_info(self, **arguments: Any) -> dict[str, Any]:
        await self._call("info", arguments)
        return {"version": "x"}


class Scene:
    def __init__(self, directory: Path, *engine_routes: str) -> None:
        self.manager = Manager()
        engine = SimpleNamespace(tokenizer_manager=self.manager, async_generate=lambda priority=None: None)
        config = SimpleNamespace(
            server_args=SimpleNamespace(served_model_name="demo"),
            dynamo_args=SimpleNamespace(
                use_sglang_tokenizer=False, engine_routes=list(engine_routes), served_model_aliases=["alias"]
            ),
            serving_mode=None,
        )
        self.said: list[Serving] = []
        self.routes = Routes(engine, config, INCARNATION, directory, self.said.append)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.manager.calls]

    async def call(self, path: str, body: Any = None) -> Any:
        return await self.routes.call(path, {} if body is None else body)

    async def adapter(self, op: str, name: Any, uri: str = "file:///x") -> dict[str, Any]:
        return await self.routes.adapter(op, {"lora_name": name, "source": {"uri": uri}})


def run(directory: Path, test: Callable[[Scene], Awaitable[None]], *engine_routes: str) -> None:
    async def main() -> None:
        await test(Scene(directory, *engine_routes))

    asyncio.run(main())


RELEASE, RESUME = "release_memory_occupation", "resume_memory_occupation"


# --- routes --------------------------------------------------------------------------------------------------------------


def test_there_are_the_incumbent_s_routes(tmp_path: Path) -> None:
    found = set(Scene(tmp_path, "info=get_server_info:tm").routes.paths)
    weights = {f"control/update_weights_from_{source}" for source in ("disk", "tensor", "distributed", "ipc")}
    profile = {"control/start_profile", "control/stop_profile", "control/update_weight_version"}
    own = {"pause_generation", "continue_generation", RELEASE, RESUME, "update/model_taints", "info"}
    assert found == weights | profile | own


def test_an_unknown_route_is_unknown_and_nothing_is_said(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        with pytest.raises(RequestError) as caught:
            await scene.call("control/release_memory_occupation")
        assert caught.value.code == Code.UNKNOWN and scene.said == [] and scene.manager.loops == 0

    run(tmp_path, test)


def test_an_operator_s_own_route_answers_as_the_engine_does(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        assert await scene.call("sub/info", {"a": 1}) == {"version": "x"}
        assert scene.manager.calls == [("info", {"a": 1})]
        with pytest.raises(ValueError, match="/engine/sub/info requires a JSON object body"):
            await scene.call("sub/info", [1])

    run(tmp_path, test, "sub/info=get_server_info:tm")


@pytest.mark.parametrize(
    ("route", "named"),
    [
        ("control/start_profile=get_server_info:tm", "collides with a built-in route"),
        ("update/model_taints=get_server_info:tm", "collides with a built-in route"),
        ("x=nosuch:tm", "tm target has no method 'nosuch'"),
        ("x=nosuch", "engine target has no method 'nosuch'"),
    ],
)
def test_an_operator_s_route_that_can_t_be_is_refused_at_the_start(tmp_path: Path, route: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Scene(tmp_path, route)


def test_a_pause_and_its_end_are_said(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        assert await scene.call("pause_generation", {"mode": "retract"}) == {"status": "ok"}
        assert await scene.call("continue_generation") == {"status": "ok"}
        assert [(serving.paused, serving.asleep) for serving in scene.said] == [(True, False), (False, False)]
        assert {serving.incarnation for serving in scene.said} == {INCARNATION} and scene.manager.loops >= 2

    run(tmp_path, test)


@pytest.mark.parametrize("mode", ["zzz", 5, None, ["abort"]])
def test_a_pause_of_a_kind_that_would_end_the_scheduler_never_reaches_it(tmp_path: Path, mode: Any) -> None:
    async def test(scene: Scene) -> None:
        with pytest.raises(ValueError, match="mode"):
            await scene.call("pause_generation", {"mode": mode})
        assert scene.manager.calls == []

    run(tmp_path, test)


@pytest.mark.parametrize("body", [{"num_steps": "x"}, {"num_steps": True}, {"start_step": 1.5}])
def test_a_profile_of_a_length_that_would_end_the_scheduler_never_reaches_it(tmp_path: Path, body: Any) -> None:
    async def test(scene: Scene) -> None:
        with pytest.raises(ValueError, match="_step"):
            await scene.call("control/start_profile", body)

    run(tmp_path, test)


def test_a_route_that_fails_says_what_is_so_afterwards(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        scene.manager.failing = {"pause"}
        with pytest.raises(RuntimeError, match="pause failed"):
            await scene.call("pause_generation")
        assert not scene.said[-1].paused
        assert await scene.call("continue_generation") == {"status": "ok"}, "the next control gets its turn"

    run(tmp_path, test)


# --- memory --------------------------------------------------------------------------------------------------------------


def test_memory_goes_and_comes_back_and_requests_are_kept_away_meanwhile(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        scene.manager.gate = asyncio.Event()
        releasing = asyncio.create_task(scene.call(RELEASE))
        while not scene.manager.calls:  # noqa: ASYNC110 - the stand-in has no event for it
            await asyncio.sleep(0)
        assert scene.routes.asleep, "from here on no request may reach the engine"
        scene.manager.gate.set()
        assert await releasing == {"status": "ok"} and scene.routes.asleep
        assert (scene.said[-1].paused, scene.said[-1].asleep) == (True, True)
        resuming = asyncio.create_task(scene.call(RESUME))
        assert await resuming == {"status": "ok"} and not scene.routes.asleep
        assert (scene.said[-1].paused, scene.said[-1].asleep) == (False, False)

    run(tmp_path, test)


def test_memory_is_not_released_under_running_requests(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        scene.manager.rid_to_state = {"a": object(), "b": object()}
        with pytest.raises(ValueError, match="2 requests are running; drain first"):
            await scene.call(RELEASE)
        assert scene.manager.calls == [] and not scene.routes.asleep
        scene.manager.rid_to_state = {}
        assert await scene.call(RELEASE) == {"status": "ok"} and scene.routes.asleep

    run(tmp_path, test)


@pytest.mark.parametrize(("mode", "allowed"), [("abort", True), ("retract", True), ("in_place", False)])
def test_paused_requests_hold_memory_only_where_they_stay_in_the_batch(tmp_path: Path, mode: str, allowed: bool) -> None:
    async def test(scene: Scene) -> None:
        scene.manager.rid_to_state = {"a": object()}
        await scene.call("pause_generation", {"mode": mode})
        if allowed:
            assert await scene.call(RELEASE) == {"status": "ok"}
        else:
            with pytest.raises(ValueError, match="1 requests are running"):
                await scene.call(RELEASE)
        assert scene.routes.asleep is allowed

    run(tmp_path, test)


def test_what_is_so_already_is_ok_and_never_reaches_the_scheduler(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        assert await scene.call(RESUME) == {"status": "ok"}
        await scene.call(RELEASE)
        assert await scene.call(RELEASE) == {"status": "ok"}
        assert await scene.call(RELEASE, {"tags": ["weights"]}) == {"status": "ok"}
        assert scene.names == ["release"]

    run(tmp_path, test)


def test_what_was_not_released_is_not_resumed(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        await scene.call(RELEASE, {"tags": ["kv_cache"]})
        with pytest.raises(ValueError, match=r"weights.*not released"):
            await scene.call(RESUME, {"tags": ["weights"]})
        assert scene.names == ["release"] and scene.routes.asleep
        assert await scene.call(RESUME, {"tags": ["kv_cache"]}) == {"status": "ok"} and not scene.routes.asleep

    run(tmp_path, test)


def test_memory_comes_back_by_kinds_and_only_the_last_one_ends_the_sleep(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        await scene.call(RELEASE, {"tags": ["weights", "kv_cache"]})
        await scene.call(RESUME, {"tags": ["weights"]})
        assert scene.routes.asleep and scene.said[-1].asleep
        await scene.call(RESUME, {"tags": ["kv_cache"]})
        assert not scene.routes.asleep and not scene.said[-1].asleep

    run(tmp_path, test)


def test_a_release_that_fails_leaves_what_was_released_before(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        scene.manager.failing = {"release"}
        with pytest.raises(RuntimeError):
            await scene.call(RELEASE)
        assert not scene.routes.asleep and not scene.said[-1].asleep
        scene.manager.failing = set()
        await scene.call(RELEASE, {"tags": ["weights"]})
        scene.manager.failing = {"release"}
        with pytest.raises((RuntimeError, ValueError)):
            await scene.call(RELEASE, {"tags": ["weights", "kv_cache"]})
        with pytest.raises(RuntimeError):
            await scene.call(RELEASE, {"tags": ["kv_cache"]})
        assert scene.routes.asleep, "the weights are still away"
        assert await scene.call(RESUME, {"tags": ["weights"]}) == {"status": "ok"} and not scene.routes.asleep

    run(tmp_path, test)


def test_a_resume_that_fails_keeps_requests_away_and_may_be_tried_again(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        await scene.call(RELEASE)
        scene.manager.failing = {"resume"}
        with pytest.raises(RuntimeError):
            await scene.call(RESUME)
        assert scene.routes.asleep and scene.said[-1].asleep
        scene.manager.failing = set()
        assert await scene.call(RESUME) == {"status": "ok"} and not scene.routes.asleep

    run(tmp_path, test)


@pytest.mark.parametrize("tags", [5, "weights", ["zzz"], [["weights"]], {"weights": 1}])
@pytest.mark.parametrize("path", [RELEASE, RESUME])
def test_kinds_of_memory_that_there_aren_t_are_refused(tmp_path: Path, path: str, tags: Any) -> None:
    async def test(scene: Scene) -> None:
        with pytest.raises(ValueError, match="tags: expected a list of"):
            await scene.call(path, {"tags": tags})
        assert scene.manager.calls == [] and not scene.routes.asleep

    run(tmp_path, test)


# --- taints --------------------------------------------------------------------------------------------------------------


def test_taints_are_sorted_kept_once_and_said(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        assert await scene.call("update/model_taints", {"taints": ["b", "a", "a"]}) == {"status": "ok", "taints": ["a", "b"]}
        assert scene.said[-1].taints == ["a", "b"]
        await scene.call("pause_generation")
        assert scene.said[-1].taints == ["a", "b"], "they outlive a pause"
        assert await scene.call("update/model_taints", {"taints": []}) == {"status": "ok", "taints": []}
        assert scene.said[-1].taints == []

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"taints": "a"}, "'taints' must be a JSON array of strings"),
        ({"taints": [1]}, "'taints' must be a JSON array of strings"),
        ({}, "'taints' must be a JSON array of strings"),
        ([1], "request body must be a JSON object"),
        ("x", "request body must be a JSON object"),
        ({"taints": ["dynamo.topology/zone"]}, "taint 'dynamo.topology/zone' uses reserved prefix 'dynamo.topology/'"),
    ],
)
def test_wrong_taints_are_refused_in_dynamo_s_words(tmp_path: Path, body: Any, words: str) -> None:
    async def test(scene: Scene) -> None:
        with pytest.raises(ValueError) as caught:
            await scene.call("update/model_taints", body)
        assert str(caught.value) == words and all(serving.taints is None for serving in scene.said)

    run(tmp_path, test)


# --- adapters ------------------------------------------------------------------------------------------------------------


class Store:
    """Stands for Dynamo's LoRA manager: an adapter's files are where its URI says."""

    async def download_lora(self, uri: str) -> dict[str, Any]:
        if "nope" in uri:
            return {"status": "error", "message": f"Local LoRA not found: {uri}"}
        return {"status": "success", "local_path": uri.removeprefix("file://")}


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler_base, "get_lora_manager", Store)


def test_an_adapter_comes_and_goes_and_both_are_said(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        answer = await scene.adapter("load_lora", "a")
        assert answer["status"] == "success" and scene.said[-1].adapters == {"a": answer["lora_id"]}
        assert (await scene.adapter("load_lora", "a", "file:///other"))["message"] == "LoRA adapter 'a' already loaded"
        assert (await scene.routes.adapter("list_loras", None))["loras"] == {"a": answer["lora_id"]}
        assert (await scene.adapter("unload_lora", "a"))["status"] == "success" and scene.said[-1].adapters == {}
        assert (await scene.adapter("unload_lora", "a"))["message"] == "LoRA adapter 'a' not found. Available LoRAs: []"

    run(tmp_path, test)


@pytest.mark.parametrize("body", [None, {}, {"lora_name": ""}, [1], "x", {"lora_name": "a", "source": "file:///x"}])
def test_a_wrong_load_is_an_answer_and_changes_nothing(tmp_path: Path, body: Any) -> None:
    async def test(scene: Scene) -> None:
        answer = await scene.routes.adapter("load_lora", body)
        assert answer["status"] == "error" and answer["message"] and scene.manager.calls == []

    run(tmp_path, test)


@pytest.mark.parametrize("name", ["demo", "alias"])
def test_an_adapter_can_t_have_the_model_s_own_name(tmp_path: Path, name: str) -> None:
    async def test(scene: Scene) -> None:
        answer = await scene.adapter("load_lora", name)
        assert answer["status"] == "error" and "already registered" in answer["message"] and scene.manager.calls == []

    run(tmp_path, test)


def test_adapters_are_loaded_again_by_the_next_engine_and_one_that_is_gone_is_left_out(tmp_path: Path) -> None:
    async def before(scene: Scene) -> None:
        await scene.adapter("load_lora", "a", "file:///a")
        await scene.adapter("load_lora", "a", "file:///other")
        await scene.adapter("load_lora", "b", "file:///b")
        await scene.adapter("load_lora", "c", "file:///c")
        await scene.adapter("unload_lora", "b")
        scene.manager.lora_fails = "d"
        assert "no such rank" in (await scene.adapter("load_lora", "d", "file:///d"))["message"]

    async def after(scene: Scene) -> None:
        scene.manager.lora_fails = "c"
        await scene.routes.reload()
        assert [arguments for _, arguments in scene.manager.calls] == [{"name": "a", "path": "/a"}, {"name": "c", "path": "/c"}]
        assert set(scene.said[-1].adapters) == {"a"}

    run(tmp_path, before)
    run(tmp_path, after)
    (kept,) = tmp_path.iterdir()
    assert json.loads(kept.read_text()) == {"a": "file:///a"}


def test_without_adapters_there_is_nothing_to_load_again(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        await scene.routes.reload()
        assert scene.manager.calls == [] and scene.said == []

    run(tmp_path, test)
