"""The configuration child with Dynamo's and SGLang's real parsers, which are imported once for all cases."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from procs.cli.serve import CPU_DEFAULTS
from procs.engine.check import IMAGE_PIPELINES, VIDEO_PIPELINES, _embeddings, _gpu_ids

ASK = """
import json, sys
from procs.engine.check import answer
for line in sys.stdin:
    print(">" + json.dumps(answer(json.loads(line))), flush=True)
"""
CPU = [part for flag, values in CPU_DEFAULTS.items() for part in (flag, *values)]

Check = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def check(model: Path) -> Iterator[Check]:
    """check(*flags, file={...}) -> the child's answer for the demo model on a CPU."""
    environ = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
    environ.pop("DYN_DISCOVERY_BACKEND", None)
    command = [sys.executable, "-W", "ignore", "-c", ASK]
    with subprocess.Popen(
        command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        stdin, stdout = child.stdin, child.stdout

        def ask(*argv: str, file: dict[str, Any] | None = None, base: bool = True) -> dict[str, Any]:
            whole = ["--model-path", str(model), *CPU, *argv] if base else list(argv)
            stdin.write(json.dumps({"argv": whole, "file": file or {}, "config_file": "node.yaml"}) + "\n")
            stdin.flush()
            line = next(line for line in stdout if line.startswith(">"))
            answer: dict[str, Any] = json.loads(line[1:])
            return answer

        yield ask
        stdin.close()


def refusal(answer: dict[str, Any]) -> str:
    assert answer.keys() == {"error"}, answer
    line = str(answer["error"])
    assert line and "\n" not in line and "Traceback" not in line
    return line


DECODES_NOT = {
    "a prefill worker": ["--disaggregation-mode", "prefill"],
    "a decode worker": ["--disaggregation-mode", "decode"],
    "a worker behind one": ["--enable-multimodal", "--dedicated-mm-encoder", "--disaggregation-mode", "pd"],
    "an embedding worker": ["--embedding-worker"],
    "text mode": ["--use-sglang-tokenizer"],
}


def test_frontend_decoding_is_for_workers_that_get_decoded_images(check: Check) -> None:
    assert check("--frontend-decoding")["media"]["frontend_decoding"] is True
    assert check()["media"]["frontend_decoding"] is False
    for who, flags in DECODES_NOT.items():
        assert "frontend-decoding" in refusal(check("--frontend-decoding", *flags)), who


def test_plain_values_of_an_aggregated_worker(check: Check, model: Path) -> None:
    found = check("--served-model-name", "one,two", "--discovery-backend", "file", "--enable-metrics", "--namespace", "ns")
    assert (found["role"], found["model_path"], found["served_model_name"]) == ("aggregated", str(model), "one")
    assert found["gpu_ids"] == [0]
    assert found["enable_metrics"] is True and (found["tp_size"], found["nnodes"], found["node_rank"]) == (1, 1, 0)
    dynamo = found["dynamo"]
    assert (dynamo["namespace"], dynamo["component"], dynamo["endpoint"]) == ("ns", "backend", "generate")
    assert dynamo["served_model_aliases"] == ["two"] and dynamo["discovery_backend"] == "file"
    assert found["worker_argv"][:2] == ["--model-path", str(model)]


@pytest.mark.parametrize(
    ("flag", "role"),
    [
        ("--disaggregation-mode=prefill", "prefill"),
        ("--disaggregation-mode=decode", "decode"),
        ("--embedding-worker", "embedding"),
        ("--rerank-worker", "rerank"),
    ],
)
def test_the_role_is_the_worker_type_that_dynamo_would_start(check: Check, flag: str, role: str) -> None:
    assert check(flag).get("role") == role


LOCAL = ["--enable-multimodal", "--embedding-transfer-mode", "local"]


@pytest.mark.parametrize(
    ("flags", "role"),
    [
        (["--enable-multimodal"], "aggregated"),
        (["--enable-multimodal", "--disaggregation-mode", "prefill"], "prefill"),
        (["--enable-multimodal", "--disaggregation-mode", "decode"], "decode"),
        ([*LOCAL, "--disaggregation-mode", "encode"], "mm_encode"),
        ([*LOCAL, "--dedicated-mm-encoder", "--disaggregation-mode", "pd"], "mm_worker"),
        ([*LOCAL, "--dedicated-mm-encoder", "--disaggregation-mode", "prefill"], "mm_prefill"),
        ([*LOCAL, "--dedicated-mm-encoder", "--disaggregation-mode", "decode"], "mm_decode"),
    ],
)
def test_media_are_taken_by_one_worker_or_by_several(check: Check, flags: list[str], role: str) -> None:
    found = check(*flags)
    assert found.get("role") == role, found
    component = {"mm_encode": "encode", "prefill": "prefill", "mm_prefill": "prefill"}.get(role, "backend")
    assert found["dynamo"]["component"] == component


def test_an_encode_worker_has_one_rank(check: Check) -> None:
    assert "--tp-size 2" in refusal(check(*LOCAL, "--disaggregation-mode", "encode", "--tp-size", "2"))


def test_nixl_has_to_be_there_for_those_who_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    server, dynamo = SimpleNamespace(tp_size=1), SimpleNamespace(embedding_transfer_mode="nixl-write")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for role in ("mm_encode", "mm_worker", "mm_prefill"):
        with pytest.raises(ValueError, match="--embedding-transfer-mode nixl-write: needs the package nixl"):
            _embeddings(role, server, dynamo)
    for role in ("mm_decode", "aggregated"):
        _embeddings(role, server, dynamo)


def kv_events(**given: Any) -> list[str]:
    return ["--kv-events-config", json.dumps({"publisher": "zmq", **given})]


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--max-total-tokns", "7"], "--max-total-tokns (did you mean --max-total-tokens?)"),
        (["--max-total", "7"], "unknown flag --max-total"),
        (["--max-total-tokns=7"], "--max-total-tokns"),
        (["-x"], "unknown flag -x"),
        (["--tp-size", "two"], "--tp"),
        (["--tp-size"], "--tp"),
        (["--load-format", "floppy"], "--load-format"),
        (["--discovery-backend", "carrier-pigeon"], "--discovery-backend"),
        (["--tool-call-parser", "qwen25", "--dyn-tool-call-parser", "hermes"], "tool-call-parser"),
        (["--custom-jinja-template", "/nonexistent.jinja"], "/nonexistent.jinja"),
        (["--disagg-config", "/nonexistent.yaml"], "disagg_config_key"),
        (["--dedicated-mm-encoder"], "--dedicated-mm-encoder"),
        (["stray"], "stray"),
        (kv_events(endpoint="ipc:///tmp/x"), "endpoint 'ipc:///tmp/x' is not tcp://HOST:PORT"),
        (kv_events(endpoint="tcp://127.0.0.1:5557"), 'use tcp://*:5557, or add "bind": true'),
        (kv_events(endpoint="tcp://*:5557", replay_endpoint="tcp://*:5557"), "endpoint and replay_endpoint overlap"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(check: Check, argv: list[str], names: str) -> None:
    assert names in refusal(check(*argv))


def test_no_model_is_one_line(check: Check) -> None:
    assert "--model" in refusal(check(base=False))


# --- the YAML file ---------------------------------------------------------------------------------------------------


def test_values_of_the_file_become_arguments_before_the_command_line(check: Check, model: Path) -> None:
    file = {
        "--model-path": "/elsewhere",
        "--enable-metrics": True,
        "--disable-radix-cache": False,
        "--exclude-tools-when-tool-choice-none": False,
        "--max-running-requests": 8,
        "--served-model-name": None,
        "--kv-events-config": {"publisher": "zmq", "endpoint": "tcp://*:5557"},
        "--cuda-graph-bs-decode": [1, 2],
    }
    found = check(file=file)
    written = found["worker_argv"][: found["worker_argv"].index("--cuda-graph-bs-decode") + 3]
    assert written == [
        "--model-path", "/elsewhere", "--enable-metrics", "--no-exclude-tools-when-tool-choice-none", "--max-running-requests",
        "8", "--kv-events-config", '{"publisher": "zmq", "endpoint": "tcp://*:5557"}', "--cuda-graph-bs-decode", "1", "2",
    ]  # fmt: skip
    assert found["model_path"] == str(model), "the command line wins"
    assert found["dynamo"]["exclude_tools_when_tool_choice_none"] is False
    assert found["dynamo"]["use_kv_events"] is True


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ({"--max-total-tokns": 7}, "did you mean --max-total-tokens?"),
        ({"--served-model-name": ["a", "b"]}, "served-model-name: expected one value"),
        ({"--enable-metrics": "yes"}, "enable-metrics: expected true or false"),
        ({"--tp-size": "two"}, "--tp"),
        ({"--tp-size": True}, "--tp"),
    ],
)
def test_a_wrong_value_in_the_file_is_one_line(check: Check, file: dict[str, Any], names: str) -> None:
    assert names in refusal(check(file=file))


# --- what is settled before anything starts ---------------------------------------------------------------------------


def value_of(argv: list[str], flag: str) -> str | None:
    """A flag's last value."""
    found = [argv[number + 1] for number, argument in enumerate(argv[:-1]) if argument == flag]
    return found[-1] if found else None


def test_text_mode_is_a_way_to_serve(check: Check) -> None:
    found = check("--use-sglang-tokenizer")
    assert (found["role"], found["text_mode"]) == ("aggregated", True) and "--use-sglang-tokenizer" in found["worker_argv"]
    assert check()["text_mode"] is False


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        ([], None),
        (["--gateway-workers", "3"], 3),
        (["--gateway-workers=3"], 3),
        (["--tokenizer-worker-num", "2"], 2),
        (["--gateway-workers", "2", "--tokenizer-worker-num", "2"], 2),
        (["--gateway-workers", "1"], 1),
    ],
)
def test_the_incumbent_s_gateway_workers_become_agents_and_the_engine_has_none(
    check: Check, flags: list[str], count: int | None
) -> None:
    found = check(*flags)
    assert found["gateway_workers"] == count
    assert not any(argument.startswith(("--gateway-workers", "--tokenizer-worker-num")) for argument in found["worker_argv"])


def test_gateway_workers_that_contradict_each_other_are_refused(check: Check) -> None:
    assert "--gateway-workers 3 conflicts with --tokenizer-worker-num 2" in refusal(
        check("--gateway-workers", "3", "--tokenizer-worker-num", "2")
    )


def test_a_disagg_section_is_inlined_and_the_command_line_wins(check: Check, tmp_path: Path) -> None:
    file = tmp_path / "disagg.yaml"
    file.write_text(
        "prefill:\n  disaggregation-mode: prefill\n  random-seed: 8\n  disable-radix-cache: true\n"
        "  served-model-name: theirs\ndecode:\n  disaggregation-mode: decode\n"
    )
    argv = ["--disagg-config", str(file), "--disagg-config-key", "prefill", "--served-model-name", "ours"]
    found = check(*argv)
    assert (found["role"], found["served_model_name"]) == ("prefill", "ours")
    written = found["worker_argv"]
    assert "--disable-radix-cache" in written and value_of(written, "--random-seed") == "8"
    assert value_of(written, "--served-model-name") == "ours"
    assert not any(argument.startswith("--disagg-config") for argument in written)
    file.unlink()
    again = check(*written, base=False)
    assert (again["role"], again["served_model_name"]) == ("prefill", "ours"), "the file isn't needed any more"
    assert again["worker_argv"] == written


@pytest.mark.parametrize(
    ("text", "key", "names"),
    [
        ("prefill:\n  max-running-requests: 8\n", "decode", "'decode' not found"),
        ("prefill: [1]\n", "prefill", "must be a dictionary"),
        ("- 1\n", "prefill", "must contain a dictionary"),
        ("prefill:\n  max-runing-requests: 8\n", "prefill", "max-runing-requests"),
    ],
)
def test_a_wrong_disagg_section_is_one_line(check: Check, tmp_path: Path, text: str, key: str, names: str) -> None:
    file = tmp_path / "disagg.yaml"
    file.write_text(text)
    assert names in refusal(check("--disagg-config", str(file), "--disagg-config-key", key))


def test_a_prefill_has_another_bootstrap_port_in_each_life_unless_one_is_given(check: Check) -> None:
    """A decode engine takes the same port for the same engine, and waits for ranks that are dead."""
    port = "--disaggregation-bootstrap-port"
    assert port not in check("--disaggregation-mode", "prefill")["worker_argv"]
    assert check("--disaggregation-mode", "prefill", port, "8123")["worker_argv"].count(port) == 1
    assert f"{port}=8123" in (given := check("--disaggregation-mode", "prefill", f"{port}=8123")["worker_argv"])
    assert port not in given
    for mode in ("decode", "null"):
        assert port not in check("--disaggregation-mode", mode)["worker_argv"]


def test_engine_routes_are_kept_for_the_engine(check: Check) -> None:
    found = check("--engine-route", "flush_cache:tm", "--engine-route", "sub/x-1.y=get_server_info")["worker_argv"]
    assert found[-4:] == ["--engine-route", "flush_cache:tm", "--engine-route", "sub/x-1.y=get_server_info"]


@pytest.mark.parametrize(
    ("route", "why"),
    [
        ("x:zzz", "unknown target 'zzz'; expected 'engine' or 'tm'"),
        ("a:b:c", "at most one ':'"),
        ("a=b=c", "at most one '='"),
        ("a=", "both the route path and method are required"),
        ("a:", "both the route and target are required"),
        ("../x=get", "the route path must contain"),
        ("a=1x", "is not a Python identifier"),
        ("x=_p", "private methods cannot be exposed"),
        ("", "descriptor is empty"),
    ],
)
def test_a_malformed_engine_route_is_refused_before_anything_starts(check: Check, route: str, why: str) -> None:
    line = refusal(check("--engine-route", route))
    assert why in line and "Invalid SGLang engine route descriptor" in line


def test_an_engine_route_twice_is_refused(check: Check) -> None:
    assert "configured more than once" in refusal(check("--engine-route", "a=get_server_info", "--engine-route", "a=flush_cache"))


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        ({"tp_size": 2}, [0, 1]),
        ({"tp_size": 2, "base_gpu_id": 2}, [2, 3]),
        ({"tp_size": 2, "gpu_id_step": 2}, [0, 2]),
        ({"tp_size": 2, "dp_size": 2}, [0, 1, 2, 3]),
        ({"tp_size": 4, "dp_size": 4, "enable_dp_attention": True}, [0, 1, 2, 3]),
        ({"tp_size": 16, "nnodes": 2}, list(range(8))),
        ({"tp_size": 2, "pp_size": 2}, [0, 1, 2, 3]),
        ({"tp_size": 2, "pp_size": 2, "nnodes": 2}, [0, 1]),
    ],
)
def test_which_gpus_a_rank_takes(given: dict[str, Any], ids: list[int]) -> None:
    """As SGLang 0.5.23 places its schedulers (engine.py, data_parallel_controller.py)."""
    plain = {
        "base_gpu_id": 0,
        "gpu_id_step": 1,
        "tp_size": 1,
        "dp_size": 1,
        "pp_size": 1,
        "nnodes": 1,
        "enable_dp_attention": False,
    }
    assert _gpu_ids(SimpleNamespace(**{**plain, **given})) == ids
    assert _gpu_ids(SimpleNamespace()) is None, "Dynamo's image and video workers have a stub of the arguments"


# --- image and video workers ---------------------------------------------------------------------------------------------


def pipeline(directory: Path, class_name: str) -> list[str]:
    """Its flags: the directory of a pipeline, as far as it is looked at."""
    (directory / "model_index.json").write_text(json.dumps({"_class_name": class_name, "_diffusers_version": "0.37.0"}))
    return ["--model-path", str(directory)]


@pytest.mark.parametrize(("flag", "role"), [("--image-diffusion-worker", "image"), ("--video-generation-worker", "video")])
def test_an_image_or_a_video_worker_has_the_stub_of_sglangs_arguments(check: Check, tmp_path: Path, flag: str, role: str) -> None:
    model = pipeline(tmp_path, "OtherPipeline")
    found = check(
        flag, *model, "--media-output-fs-url", f"file://{tmp_path}/x", "--media-output-http-url", "https://x", "--tp-size", "2"
    )
    assert (found["role"], found["tp_size"], found["nnodes"], found["gpu_ids"]) == (role, 2, 1, None)
    assert found["dynamo"]["media_output_fs_url"] == f"file://{tmp_path}/x"
    assert found["dynamo"]["media_output_http_url"] == "https://x"
    assert not (tmp_path / "x").exists(), "nothing is made yet"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--video-generation-worker"], "one of the two"),
        (["--kv-events-config", '{"publisher": "zmq", "endpoint": "tcp://*:5557"}'], "--kv-events-config"),
        (["--nnodes", "2", "--node-rank", "1"], "--nnodes"),
        (["--media-output-fs-url", "nosuch://x"], "--media-output-fs-url nosuch://x"),
        (["--media-output-fs-url", "file:///dev/null/x"], "/dev/null can't be written to"),
        (["--health-check-payload", '{"prompt": "x", "model": "m", "size": "big"}'], "--health-check-payload: size"),
        (["--frontend-decoding"], "--frontend-decoding"),
    ],
)
def test_what_an_image_worker_can_not_have_is_refused(check: Check, tmp_path: Path, flags: list[str], named: str) -> None:
    assert named in refusal(check("--image-diffusion-worker", *pipeline(tmp_path, "ZImagePipeline"), *flags))


@pytest.mark.parametrize("flag", ["--image-diffusion-worker", "--video-generation-worker"])
def test_a_model_of_text_is_no_pipeline(check: Check, model: Path, flag: str) -> None:
    assert f"--model-path {model}: no image or video pipeline: it has no model_index.json" in refusal(check(flag))


def test_a_pipeline_of_the_other_kind_is_refused(check: Check, tmp_path: Path) -> None:
    image, video = "--image-diffusion-worker", "--video-generation-worker"
    assert f"makes videos: {video}" in refusal(check(image, *pipeline(tmp_path, "WanPipeline")))
    assert check(video, *pipeline(tmp_path, "WanPipeline"))["role"] == "video"
    assert f"makes pictures: {image}" in refusal(check(video, *pipeline(tmp_path, "ZImagePipeline")))
    assert check(image, *pipeline(tmp_path, "ZImagePipeline"))["role"] == "image"
    (tmp_path / "model_index.json").write_text("{")
    assert "model_index.json: not JSON" in refusal(check(image, "--model-path", str(tmp_path)))


def test_a_pipeline_that_is_named_by_a_hub_id_is_left_to_the_engine(check: Check) -> None:
    assert check("--image-diffusion-worker", "--model-path", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")["role"] == "image"


def test_what_sglang_knows_without_an_index_is_left_to_it(check: Check, tmp_path: Path) -> None:
    (known := tmp_path / "pi05").mkdir()
    assert check("--image-diffusion-worker", "--model-path", str(known))["role"] == "image"


REGISTRY = """
import json, sys
from pathlib import Path
from sglang.multimodal_gen import registry
kinds = {}
for name in json.load(sys.stdin):
    directory = Path(sys.argv[1], f"m{len(kinds)}")
    (directory / "transformer").mkdir(parents=True)
    (directory / "vae").mkdir()
    (directory / "model_index.json").write_text(json.dumps({"_class_name": name, "_diffusers_version": "0.37.0"}))
    task = registry.get_model_info(str(directory)).pipeline_config_cls.task_type
    kinds[name] = "image" if task.is_image_gen() else "video"
print(">" + json.dumps(kinds))
"""


def test_the_known_pipelines_are_of_the_kind_that_sglangs_registry_says(tmp_path: Path) -> None:
    expected = {name: "image" for name in IMAGE_PIPELINES} | {name: "video" for name in VIDEO_PIPELINES}
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REGISTRY, str(tmp_path)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, input=json.dumps(list(expected)), capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert json.loads(next(line[1:] for line in said.splitlines() if line.startswith(">"))) == expected
