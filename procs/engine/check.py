"""The short-lived child of `sgnode serve` that parses the worker's flags once, with Dynamo's groups and SGLang's parser.

Reads {"argv": [...]} on stdin, writes one JSON object on stdout: the resolved plain values, or {"error": "one line"}.
"""

import argparse
import asyncio
import difflib
import json
import os
import re
import sys
import tempfile
from typing import Any


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


def _unknown(argv: list[str], parsers: list[argparse.ArgumentParser]) -> str:
    """The first argument that no parser knows in full, as an error line; empty when there is none."""
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    for argument in argv:
        flag = argument.partition("=")[0]
        # A negative number is a value.
        if not flag.startswith("-") or flag in known or re.fullmatch(r"-\d.*|-", flag):
            continue
        near = difflib.get_close_matches(flag, known, 1, 0.7) or sorted(k for k in known if k.startswith(flag))
        return f"unknown flag {flag}" + (f" (did you mean {near[0]}?)" if near else "")
    return ""


def resolve(argv: list[str]) -> dict[str, Any]:
    """Parse and check. Raises ValueError, SystemExit or whatever the parsers raise."""
    unknown = _unknown(argv, _parsers())
    if unknown:
        raise ValueError(unknown)
    from dynamo.sglang import args

    # Weights are fetched by the engine while it loads, where it can be seen and stopped.
    args.should_fetch_model = lambda *_: False
    config = asyncio.run(args.parse_args(argv))
    server, dynamo = config.server_args, config.dynamo_args
    structural = dynamo.structural_tag
    if structural is not None and not isinstance(structural, dict):
        import msgspec

        structural = msgspec.to_builtins(structural) or None
    return {
        "role": _role(server, dynamo),
        "model_path": server.model_path,
        "served_model_name": server.served_model_name,
        "enable_metrics": bool(server.enable_metrics),
        "tp_size": server.tp_size,
        "dp_size": server.dp_size,
        "pp_size": server.pp_size,
        "nnodes": server.nnodes,
        "node_rank": server.node_rank,
        "dist_init_addr": server.dist_init_addr,
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
        },
    }


def _role(server: Any, dynamo: Any) -> str:
    """The worker type that these arguments ask for (dynamo.sglang 1.6.1, main.py)."""
    flags = (
        ("image", "image_diffusion_worker"),
        ("video", "video_generation_worker"),
        ("embedding", "embedding_worker"),
        ("rerank", "rerank_worker"),
        ("mm_encode", "multimodal_encode_worker"),
        ("mm_worker", "enable_multimodal"),
    )
    for role, name in flags:
        if getattr(dynamo, name, False):
            return role
    if getattr(server, "dllm_algorithm", None):
        return "diffusion_lm"
    return {"prefill": "prefill", "decode": "decode"}.get(str(server.disaggregation_mode), "aggregated")


def _line(error: BaseException, noise: str) -> str:
    """One line for an operator: argparse's own words, the last error that was logged, or the exception's text."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", noise)
    if not isinstance(error, SystemExit):
        return " ".join(str(error).split()) or type(error).__name__
    found = re.findall(r"^\S*: error: (.*)$", plain, re.MULTILINE) or re.findall(r"ERROR\s+\S+:\s+(.*)$", plain, re.MULTILINE)
    said = found or [line for line in plain.splitlines() if line.strip()]
    return str(said[-1]) if said else f"exit code {error.code}"


def main() -> int:
    answer = os.fdopen(os.dup(1), "w")
    request = json.load(sys.stdin)
    # Loggers, argparse and native code write to the descriptors: all of it is kept, only a refusal's own words are shown.
    with tempfile.TemporaryFile() as noise:
        for descriptor in (1, 2):
            os.dup2(noise.fileno(), descriptor)
        try:
            if request.get("help"):
                result: dict[str, Any] = {"help": "\n".join(parser.format_help() for parser in _parsers())}
            else:
                result = resolve(request["argv"])
        except (Exception, SystemExit) as error:
            sys.stdout.flush()
            sys.stderr.flush()
            noise.seek(0)
            result = {"error": _line(error, noise.read().decode(errors="replace"))}
        json.dump(result, answer)
        answer.flush()
        # torch's teardown takes a second and has nothing to save.
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
