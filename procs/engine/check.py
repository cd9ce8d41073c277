"""The short-lived child of `sgnode serve` that parses the worker's flags once, with Dynamo's groups and SGLang's parser.

Reads {"argv": [...], "file": {flag: value}, "config_file": NAME} on stdin, ``file`` being what a YAML file says; writes one
JSON object on stdout: the resolved plain values with the merged ``worker_argv``, or {"error": "one line"}.
"""

import argparse
import asyncio
import contextlib
import difflib
import gc
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

from shared import nixl


def _parsers() -> list[argparse.ArgumentParser]:
    """Dynamo's and SGLang's parsers, as dynamo.sglang 1.6.1 builds them (args.py, parse_args)."""
    from dynamo.common.configuration.groups.router_args import register_worker_router_help
    from dynamo.common.configuration.groups.runtime_args import DynamoRuntimeArgGroup
    from dynamo.sglang._compat import add_sglang_cli_compat
    from dynamo.sglang.backend_args import DynamoSGLangArgGroup
    from sglang.srt.server_args import ServerArgs

    worker = argparse.ArgumentParser(prog="dynamo.sglang", add_help=False)
    DynamoRuntimeArgGroup().add_arguments(worker)
    DynamoSGLangArgGroup().add_arguments(worker)
    register_worker_router_help(worker)
    engine = argparse.ArgumentParser(prog="sglang", add_help=False)
    ServerArgs.add_cli_args(engine)
    add_sglang_cli_compat(engine)
    return [worker, engine]


def _options() -> dict[str, argparse.Action]:
    """Every flag, in full, with its action; SGLang's wins, as its parser is asked last."""
    return {option: action for parser in _parsers() for action in parser._actions for option in action.option_strings}


def _unknown(argv: list[str], known: dict[str, argparse.Action]) -> str:
    """The first argument that no parser knows in full, as an error line; empty when there is none."""
    for argument in argv:
        flag = argument.partition("=")[0]
        # A negative number is a value.
        if not flag.startswith("-") or flag in known or re.fullmatch(r"-\d.*|-", flag):
            continue
        near = difflib.get_close_matches(flag, known, 1, 0.7) or sorted(k for k in known if k.startswith(flag))
        return f"unknown flag {flag}" + (f" (did you mean {near[0]}?)" if near else "")
    return ""


def _arguments(flag: str, value: Any, known: dict[str, argparse.Action]) -> list[str]:
    """A value of the YAML file as arguments. Raises ValueError for a value that the flag can't have."""
    action = known.get(flag)
    if action is None:
        raise ValueError(_unknown([flag], known))
    is_switch = action.nargs == 0
    match value:
        case None:
            return []
        case False if is_switch:
            negative = f"--no-{flag[2:]}"
            return [negative] if negative in known else []
        case True if is_switch:
            return [flag]
        case bool():
            return [flag, str(value).lower()]
        case list() if isinstance(action, argparse._AppendAction):
            return [part for item in value for part in (flag, str(item))]
        case list() if action.nargs in ("+", "*"):
            return [flag, *(str(item) for item in value)] if value else []
        case list():
            raise ValueError(f"{flag[2:]}: expected one value, got a list")
        case dict():
            return [flag, json.dumps(value)]
    if is_switch:
        raise ValueError(f"{flag[2:]}: expected true or false, got {value!r}")
    return [flag, str(value)]


def _merged(request: dict[str, Any], known: dict[str, argparse.Action]) -> list[str]:
    """The file's values, then the command line, which wins by coming last. Raises ValueError."""
    written: list[str] = []
    for flag, value in request.get("file", {}).items():
        try:
            written += _arguments(flag, value, known)
        except ValueError as error:
            raise ValueError(f"--config {request['config_file']}: {error}") from error
    unknown = _unknown(request["argv"], known)
    if unknown:
        raise ValueError(unknown)
    return [*written, *request["argv"]]


class _Errors(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


UNSUPPORTED = {
    "fpm_trace": "--fpm-trace",
    "dump_config_to": "--dump-config-to",
}
"""Features of dynamo.sglang that are not built yet: refused at start, never ignored."""


def resolve(request: dict[str, Any]) -> dict[str, Any]:
    """Merge, parse and check. Raises ValueError, SystemExit or whatever the parsers raise."""
    argv = _merged(request, _options())
    from dynamo.sglang import args
    from dynamo.sglang.engine_routes import parse_engine_route_descriptors

    before = dict(os.environ)
    # Weights are fetched by the engine while it loads, where it can be seen and stopped.
    args.should_fetch_model = lambda *_: False
    # They say why they give up in their logs, which Dynamo's handler writes past sys.stderr.
    said = _Errors()
    loggers = [logging.getLogger(name) for name in (None, "sglang")]
    for logger in loggers:
        logger.addHandler(said)
    try:
        config = asyncio.run(args.parse_args(argv))
    except SystemExit as error:
        if said.lines:
            raise ValueError(said.lines[-1]) from error
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(said)
    server, dynamo = config.server_args, config.dynamo_args
    argv = _settled(argv, config)
    for field, flag in UNSUPPORTED.items():
        if getattr(dynamo, field, None):
            raise ValueError(f"{flag} is not supported by this version of sgnode")
    if getattr(server, "enable_forward_pass_metrics", False):
        raise ValueError("--enable-forward-pass-metrics is not supported by this version of sgnode")
    if getattr(server, "load_format", None) == "gms":
        raise ValueError("--load-format gms is not supported by this version of sgnode")
    if os.environ.get("DYN_SNAPSHOT_CONTROL_DIR"):
        raise ValueError("DYN_SNAPSHOT_CONTROL_DIR: snapshots are not supported by this version of sgnode")
    _embeddings(_role(server, dynamo), server, dynamo)
    _frontend_decoding(_role(server, dynamo), dynamo)
    _generates_media(_role(server, dynamo), dynamo, argv)
    _pipeline(_role(server, dynamo), server.model_path)
    if dynamo.use_kv_events:
        _kv_events(json.loads(server.kv_events_config), server)
    parse_engine_route_descriptors(dynamo.engine_routes)
    structural = dynamo.structural_tag
    if structural is not None and not isinstance(structural, dict):
        import msgspec

        structural = msgspec.to_builtins(structural) or None
    return {
        # Dynamo's own way from a flag to its runtime, in every process that has one.
        "environment": {name: value for name, value in os.environ.items() if _is_for_runtime(name, value, before)},
        "worker_argv": argv,
        "role": _role(server, dynamo),
        "text_mode": bool(dynamo.use_sglang_tokenizer),
        "health_check_payload": _health_check(server, dynamo),
        "gateway_workers": _gateway_workers(server, dynamo),
        "model_path": server.model_path,
        "served_model_name": server.served_model_name,
        "media": {
            "per_kind": getattr(server, "limit_mm_data_per_request", None) or {},
            "domains": list(getattr(server, "allowed_media_domains", None) or ()),
            "frontend_decoding": bool(getattr(dynamo, "frontend_decoding", False)),
        },
        "enable_metrics": bool(server.enable_metrics),
        "tp_size": server.tp_size,
        "dp_size": server.dp_size,
        # Dynamo's image and video workers have a stub of SGLang's arguments without these.
        "pp_size": getattr(server, "pp_size", 1),
        "nnodes": getattr(server, "nnodes", 1),
        "node_rank": getattr(server, "node_rank", 0),
        "dist_init_addr": getattr(server, "dist_init_addr", None),
        "group_facts": _group_facts(server),
        "gpu_ids": _gpu_ids(server),
        "dynamo": {
            "namespace": dynamo.namespace,
            "component": dynamo.component,
            "endpoint": dynamo.endpoint,
            "discovery_backend": dynamo.discovery_backend,
            "request_plane": dynamo.request_plane,
            "response_plane": getattr(dynamo, "response_plane", None),
            "event_plane": dynamo.event_plane or "zmq",
            "endpoint_types": dynamo.endpoint_types,
            "custom_jinja_template": dynamo.custom_jinja_template,
            "served_model_aliases": list(getattr(dynamo, "served_model_aliases", None) or []),
            "model_source_uri": getattr(dynamo, "model_source_uri", None),
            "kv_state_endpoint": dynamo.kv_state_endpoint,
            "tool_call_parser": dynamo.dyn_tool_call_parser,
            "reasoning_parser": dynamo.dyn_reasoning_parser,
            "default_thinking_mode": dynamo.dyn_default_thinking_mode,
            "exclude_tools_when_tool_choice_none": dynamo.exclude_tools_when_tool_choice_none,
            "structural_tag": structural,
            "enable_local_indexer": bool(getattr(dynamo, "enable_local_indexer", True)),
            "use_kv_events": dynamo.use_kv_events,
            "engine_request_limit": getattr(dynamo, "engine_request_limit", None),
            "media_output_fs_url": dynamo.media_output_fs_url,
            "media_output_http_url": dynamo.media_output_http_url,
        },
    }


def _generates_media(role: str, dynamo: Any, argv: list[str]) -> None:
    """What an image or a video worker can't have, and where its files go. Raises ValueError."""
    if role not in ("image", "video"):
        return
    if dynamo.image_diffusion_worker and dynamo.video_generation_worker:
        raise ValueError("--image-diffusion-worker, --video-generation-worker: one of the two")
    if dynamo.use_kv_events:
        raise ValueError("--kv-events-config: image and video workers have no KV cache")
    if any(argument.partition("=")[0] == "--nnodes" for argument in argv):  # Dynamo's stub has lost it
        raise ValueError("--nnodes: an image or a video worker is on one node")
    from dynamo.common.storage import get_fs

    flag, url = "--media-output-fs-url", dynamo.media_output_fs_url
    try:
        store = get_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise ValueError(f"{flag} {url}: {error}") from error
    if "file" not in store.fs.protocol:
        return  # whether it can be reached shows with the first file
    place = next(folder for folder in (Path(store.path), *Path(store.path).absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {url}: {place} can't be written to")


VIDEO_PIPELINES = ("HunyuanVideoPipeline", "WanImageToVideoPipeline", "WanPipeline")
IMAGE_PIPELINES = (
    "Flux2KleinPipeline", "Flux2Pipeline", "FluxPipeline", "GlmImagePipeline", "QwenImageEditPipeline",
    "QwenImageEditPlusPipeline", "QwenImagePipeline", "StableDiffusion3Pipeline", "StableDiffusionXLPipeline", "ZImagePipeline",
)  # fmt: skip
"""What these make, whatever their directory is called (SGLang 0.5.23's registry, which knows more but takes 4 s to import)."""


def _pipeline(role: str, model_path: str) -> None:
    """A local directory is a pipeline, and of the role's kind as far as its class is known. Raises ValueError."""
    if role not in ("image", "video") or not Path(model_path).is_dir():
        return
    # The order of SGLang 0.5.23 (_local_model_index_path).
    indexes = [path for name in ("model_index.json", "modular_model_index.json") if (path := Path(model_path, name)).is_file()]
    if not indexes:
        if not _known_without_index(model_path):
            raise ValueError(f"--model-path {model_path}: no image or video pipeline: it has no model_index.json")
        return
    try:
        index = json.loads(indexes[0].read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--model-path: {indexes[0]}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--model-path: {indexes[0]}: not JSON: {error}") from error
    name = index.get("_class_name") if isinstance(index, dict) else None
    if role == "image" and name in VIDEO_PIPELINES:
        raise ValueError(f"--image-diffusion-worker: {model_path} ({name}) makes videos: --video-generation-worker")
    if role == "video" and name in IMAGE_PIPELINES:
        raise ValueError(f"--video-generation-worker: {model_path} ({name}) makes pictures: --image-diffusion-worker")


def _known_without_index(model_path: str) -> bool:
    """SGLang has some pipelines of other layouts, by name or manifest. It is asked only here, as that takes seconds."""
    try:
        from sglang.cli.utils import get_is_diffusion_model
    except ImportError:
        return True  # the engine finds out
    return bool(get_is_diffusion_model(model_path))


def _health_check(server: Any, dynamo: Any) -> dict[str, Any] | None:
    """--health-check-payload or DYN_HEALTH_CHECK_PAYLOAD: JSON or @FILE, a request that the role can take. Raises ValueError."""
    given = getattr(dynamo, "health_check_payload", None)
    if not given:
        return None
    from shared import roles
    from shared.errors import RequestError
    from shared.frames import EngineFacts
    from shared.roles import canary

    flag = "--health-check-payload"
    try:
        payload = json.loads(Path(given[1:]).read_text(encoding="utf-8") if given.startswith("@") else given)
    except OSError as error:
        raise ValueError(f"{flag} {given}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{flag}: not JSON: {error}") from error
    if not isinstance(payload, dict):
        raise ValueError(f"{flag}: expected a JSON object, got {type(payload).__name__}")
    role = roles.find(_role(server, dynamo), text=bool(dynamo.use_sglang_tokenizer))
    name = str(server.served_model_name)
    # As far as a request depends on the engine before there is one.
    facts = EngineFacts(role.name, "", "", "", name, 0, 1, 1, None, None, None, 0, 1, None, [], 0.0, fake_bootstrap_host="fake")
    try:
        canary.payload(role, facts, json.loads(json.dumps(payload)), None)
    except RequestError as error:
        raise ValueError(f"{flag}: {error.message}") from error
    return payload


def _is_for_runtime(name: str, value: str, before: dict[str, str]) -> bool:
    return name.startswith(("DYN_TCP_TLS_", "NATS_TLS_", "DYN_FPM_")) and before.get(name) != value


def _settled(argv: list[str], config: Any) -> list[str]:
    """The arguments with everything in them that another look could find changed: a file's section.

    Every incarnation of the engine must start from the same. Not so with a prefill engine's bootstrap port, where none is given:
    a decode engine would take the next incarnation for the dead one (procs.engine.adapter.backend). Raises ValueError.
    """
    from dynamo.sglang.args import _load_disagg_config_section, _remove_cli_flag_and_value

    dynamo = config.dynamo_args
    written: list[str] = []
    if dynamo.disagg_config and dynamo.disagg_config_key:
        known = _options()
        for name, value in _load_disagg_config_section(dynamo.disagg_config, dynamo.disagg_config_key).items():
            try:
                written += _arguments(f"--{str(name).replace('_', '-')}", value, known)
            except ValueError as error:
                raise ValueError(f"--disagg-config {dynamo.disagg_config}: {error}") from error
    for flag in ("--disagg-config", "--disagg-config-key", "--gateway-workers", "--tokenizer-worker-num"):
        argv = _remove_cli_flag_and_value(argv, flag)
    return [*written, *argv]


def _embeddings(role: str, server: Any, dynamo: Any) -> None:
    """What an encode worker and those behind it need. Raises ValueError."""
    if not role.startswith("mm_"):
        return
    mode = getattr(dynamo.embedding_transfer_mode, "value", dynamo.embedding_transfer_mode)
    # Decode has the KV cache, and never the embeddings.
    if role != "mm_decode" and str(mode).startswith("nixl") and importlib.util.find_spec("nixl") is None:
        raise ValueError(f"--embedding-transfer-mode {mode}: needs the package nixl; `local` is for workers of one machine")
    if role == "mm_encode" and server.tp_size > 1:
        raise ValueError(f"--tp-size {server.tp_size}: an encode worker has one rank; start more of them instead")


def _frontend_decoding(role: str, dynamo: Any) -> None:
    """Whose requests have images that a frontend can decode, and what reads them. Raises ValueError."""
    if not getattr(dynamo, "frontend_decoding", False):
        return
    flag = "--frontend-decoding"
    if role not in ("aggregated", "mm_encode"):
        raise ValueError(f"{flag}: for aggregated and encode workers; a worker of the role {role} gets no decoded images")
    if dynamo.use_sglang_tokenizer:
        raise ValueError(f"{flag}: the frontend decodes nothing of a request that --use-sglang-tokenizer leaves as it is")
    if nixl.libraries() is None or importlib.util.find_spec("nixl") is None:
        raise ValueError(f"{flag}: needs the package nixl (pip install nixl==1.5.0)")


def _gateway_workers(server: Any, dynamo: Any) -> int | None:
    """How many processes the incumbent would put between engine and frontend: here so many agents. Raises ValueError."""
    from dynamo.sglang.gateway import effective_gateway_workers

    count = effective_gateway_workers(server, dynamo)
    return count if count > 1 or getattr(dynamo, "gateway_workers", None) else None


def _kv_events(given: dict[str, Any], server: Any) -> None:
    """The relay connects to what SGLang binds, one port a DP rank (sglang 0.5.23, ZmqEventPublisher). Raises ValueError."""
    from dynamo.sglang.capacity import sglang_dp_layout

    ports = []
    for name in ("endpoint", "replay_endpoint"):
        endpoint = given.get(name, "tcp://*:5557" if name == "endpoint" else None)
        if endpoint is None:
            continue
        match = re.fullmatch(r"tcp://(.+):([0-9]+)", str(endpoint))
        if match is None:
            raise ValueError(f"--kv-events-config: {name} {endpoint!r} is not tcp://HOST:PORT")
        if name == "endpoint" and match[1] not in ("*", "0.0.0.0", "::", "[::]") and not given.get("bind"):
            raise ValueError(
                f'--kv-events-config: SGLang would connect to {endpoint}: use tcp://*:{match[2]}, or add "bind": true'
            )
        ports.append(int(match[2]))
    ranks, _ = sglang_dp_layout(server)
    if len(ports) == 2 and abs(ports[0] - ports[1]) < ranks:
        raise ValueError(f"--kv-events-config: endpoint and replay_endpoint overlap: each has {ranks} ports, one a DP rank")


ALIKE = (
    "tp_size", "pp_size", "dp_size", "ep_size", "attn_dp_size", "enable_dp_attention", "nnodes", "dtype", "quantization",
    "kv_cache_dtype", "page_size", "context_length", "attention_backend", "speculative_algorithm", "disaggregation_mode",
)  # fmt: skip
"""SGLang's arguments that are the same on every rank: otherwise the ranks wait for each other for ever, or answer nonsense."""


def _group_facts(server: Any) -> dict[str, str]:
    """What the nodes of a group compare before they start."""
    import sglang

    found = {name: str(getattr(server, name)) for name in ALIKE if hasattr(server, name)}
    found["SGLang"] = sglang.__version__
    found["model"] = str(server.served_model_name)
    config = Path(str(server.model_path)) / "config.json"
    # The same model may be in another directory on another host.
    known = config.is_file()
    found["model's config.json"] = hashlib.sha256(config.read_bytes()).hexdigest()[:12] if known else str(server.model_path)
    return found


def _gpu_ids(server: Any) -> list[int] | None:
    """Which of the visible GPUs this rank's schedulers take (SGLang 0.5.23: engine.py, data_parallel_controller.py)."""
    if not hasattr(server, "base_gpu_id"):
        return None
    pp, nnodes = getattr(server, "pp_size", 1), getattr(server, "nnodes", 1)
    pp_here, tp_here = max(pp // nnodes, 1), server.tp_size // max(nnodes // pp, 1)
    replicas = 1 if getattr(server, "enable_dp_attention", False) else server.dp_size
    step = server.gpu_id_step
    return sorted(
        {
            server.base_gpu_id + replica * server.tp_size * pp * step + stage * tp_here + rank * step
            for replica in range(replicas)
            for stage in range(pp_here)
            for rank in range(tp_here)
        }
    )


def _role(server: Any, dynamo: Any) -> str:
    """The worker type that these arguments ask for (dynamo.sglang 1.6.1, main.py)."""
    flags = (
        ("image", "image_diffusion_worker"),
        ("video", "video_generation_worker"),
        ("embedding", "embedding_worker"),
        ("rerank", "rerank_worker"),
        ("mm_encode", "multimodal_encode_worker"),
    )
    for role, name in flags:
        if getattr(dynamo, name, False):
            return role
    part = str(server.disaggregation_mode)
    if getattr(dynamo, "multimodal_worker", False):  # --dedicated-mm-encoder
        return f"mm_{part}" if part in ("prefill", "decode") else "mm_worker"
    if getattr(server, "dllm_algorithm", None):
        return "diffusion_lm"
    return part if part in ("prefill", "decode") else "aggregated"


def _line(error: BaseException, noise: str) -> str:
    """One line for an operator: argparse's own words, the exception's text, or the last thing that was printed."""
    text = " ".join(str(error).split())
    if not isinstance(error, SystemExit):
        return text or type(error).__name__
    found = re.findall(r"error: (.*)", noise)
    if found:
        return str(found[-1])
    said = [line for line in noise.splitlines() if line.strip()]
    return re.sub(r"\x1b\[[0-9;]*m", "", said[-1]) if said else f"the arguments were refused (exit code {text})"


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What the parent gets: the resolved values, the parsers' help, or an error line. Never raises."""
    noise = io.StringIO()
    try:
        with contextlib.redirect_stderr(noise), contextlib.redirect_stdout(noise):
            if request.get("help"):
                return {"help": "\n".join(parser.format_help() for parser in _parsers())}
            return resolve(request)
    except (Exception, SystemExit) as error:
        return {"error": _line(error, noise.getvalue())}


def main() -> None:
    gc.disable()  # nearly all of the time goes into imports, which leave no garbage
    # Whatever prints to stdout must not get between the parent and the answer.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    json.dump(answer(json.load(sys.stdin)), out)
    out.flush()
    # torch's teardown takes a second and has nothing to save.
    os._exit(0)


if __name__ == "__main__":
    main()
