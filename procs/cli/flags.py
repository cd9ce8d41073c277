"""The node's own flags of `sgnode serve`, the YAML file, and what is left for SGLang and Dynamo."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from procs.cli import health
from shared.config import MediaLimits, Synthetic
from shared.errors import NodeError
from shared.logs import JSONL, READABLE

DESCRIPTION = """\
Run one node in the foreground: the engine and its side processes under supervisord.

Beside the flags below it takes every flag and environment variable of `python -m dynamo.sglang` and of SGLang, with the
same meaning (`sgnode serve --help-all` lists them). Flags are never abbreviated. Ctrl-C drains and stops."""

EPILOG = """\
examples:
  sgnode serve ./models/demo-llama
  sgnode serve Qwen/Qwen3-8B --tp-size 2 --served-model-name qwen
  sgnode serve --config node.yaml
  sgnode serve MODEL --discovery-backend etcd --namespace prod      (join a cluster; ETCD_ENDPOINTS names it)"""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are NodeErrors: the caller prints one line."""

    def error(self, message: str) -> NoReturn:
        raise NodeError(message)


@dataclass
class NodeFlags:
    """Parsed node flags, and the arguments left for the worker. Ports may still be 0."""

    name: str
    runtime_dir: Path | None
    agents: int
    frontend: bool | None
    http_host: str
    http_port: int
    system_host: str
    system_port: int
    drain_grace: float
    drain_timeout: float
    hang_timeout: float
    health: dict[str, Any]
    """Fields of NodeConfig that Dynamo's variables for health checks and the system port set."""
    group_port: int | None
    group_key_file: str | None
    group_deadline: float
    synthetic: Synthetic | None
    media: dict[str, Any]
    """Fields of MediaLimits that are the node's flags."""
    console: bool
    log_format: str | None
    worker_argv: list[str]
    """Arguments of the command line that are not the node's."""
    worker_file: dict[str, Any]
    """Values of the YAML file that are not the node's, by flag; the command line goes before them."""
    config_file: str


def _port(text: str) -> int:
    value = int(text) if text.isdigit() else -1
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 (any free one) to 65535, got {text!r}")
    return value


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"expected seconds from 0, got {text!r}")
    return value


def _timeout(text: str) -> float:
    value = _seconds(text)
    if not value:
        raise argparse.ArgumentTypeError(f"expected seconds, more than 0, got {text!r}")
    return value


def _deadline(text: str) -> float:
    value = _seconds(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1 s (nodes say so twice a second), got {text!r}")
    return value


def _synthetic(text: str) -> Synthetic:
    try:
        dials = dict(item.split("=", 1) for item in text.split(",") if item)
        if unknown := dials.keys() - set(Synthetic.__struct_fields__):
            raise ValueError(f"no such dial: {min(unknown)}")
        return msgspec.convert(dials, Synthetic, strict=False)
    except (ValueError, msgspec.ValidationError) as error:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE,...: {error}") from error


def _environment_seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    """A duration from Dynamo's environment; Dynamo 1.6.1 takes the default for an invalid one and 0 for a negative one."""
    try:
        return max(0.0, float(environ[name]))
    except (KeyError, ValueError):
        return default


def parser(environ: Mapping[str, str] = os.environ) -> Parser:
    """The parser of the node's flags."""
    made = Parser(
        prog="sgnode serve",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="sgnode serve [MODEL] [node flags] [flags of dynamo.sglang and SGLang]",
    )
    add = made.add_argument
    add("--help-all", action="store_true", help="show the flags of dynamo.sglang and SGLang as well")
    add("--name", default="default", help="name of the node on this machine (default: %(default)s)")
    add("--runtime-dir", type=Path, help="sockets, logs, state; mode 0700 (default: /run/sgnode/NAME, or the user's own)")
    add("--config", metavar="FILE", help="YAML file with any of these flags, without the dashes; the command line wins")
    add("--agents", type=count, default=1, help="Dynamo identities in front of the engine (default: %(default)s)")
    add(
        "--frontend",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="run dynamo.frontend as well (default: with --discovery-backend file, which is the default)",
    )
    add("--http-host", default="127.0.0.1", help="address of the frontend (default: %(default)s)")
    add("--http-port", type=_port, default=8000, help="OpenAI HTTP port; 0: any free one (default: %(default)s)")
    add(
        "--system-port",
        type=_port,
        default=_system_port(environ),
        help="/live /health /ready /metrics; 0: any free one (default: DYN_SYSTEM_PORT or 9090, on DYN_SYSTEM_HOST or 127.0.0.1)",
    )
    add(
        "--drain-grace",
        type=_seconds,
        default=_environment_seconds(environ, "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", 5.0),
        help="seconds after the withdrawal in which requests are still taken (default: %(default)g)",
    )
    add("--drain-timeout", type=_seconds, default=300.0, help="seconds that running streams get to finish (default: %(default)g)")
    add(
        "--hang-timeout",
        type=_seconds,
        default=300.0,
        help="seconds after which a hanging engine is killed and started again; 0: never (default: %(default)g)",
    )
    group = made.add_argument_group("a model over several nodes (with --nnodes, --node-rank, --dist-init-addr)")
    group.add_argument("--group-port", type=_port, help="where they meet, on rank 0 (default: --dist-init-addr's + 100)")
    group.add_argument("--group-key-file", help="made by `sgnode group-key FILE`, the same on every node")
    group.add_argument(
        "--group-deadline",
        type=_deadline,
        default=2.0,
        help="seconds without a sign of life of another node that end the epoch everywhere (default: %(default)g)",
    )
    limits, bounds = made.add_argument_group("images, videos and audio in requests"), MediaLimits()
    limits.add_argument(
        "--media-max-items", type=count, default=bounds.max_items, help="of one request, at most (default: %(default)s)"
    )
    limits.add_argument(
        "--media-max-megapixels",
        type=count,
        default=bounds.max_pixels // 1_000_000,
        help="of one image, sent or generated, at most; all frames of a generated video: 16 times as many (default: %(default)s)",
    )
    limits.add_argument(
        "--media-timeout", type=_timeout, default=bounds.timeout, help="seconds to fetch one item (default: %(default)g)"
    )
    limits.add_argument(
        "--media-memory-mb",
        type=count,
        default=bounds.memory_bytes >> 20,
        help="what an agent holds of them at a time, at most; past it requests go elsewhere (default: %(default)s)",
    )
    add(
        "--log-format",
        choices=(READABLE, JSONL),
        help="of every process's log lines (default: DYN_LOGGING_CONSOLE_FORMAT, DYN_LOGGING_JSONL, or readable)",
    )
    add("--console", action=argparse.BooleanOptionalAction, default=True, help="show progress on standard output")
    add("--synthetic", type=_synthetic, help=argparse.SUPPRESS)
    return made


def _system_port(environ: Mapping[str, str]) -> str:
    # Negative means "disabled" to Dynamo 1.6.1; this port is the node's own and always there. A string is checked like a flag.
    text = environ.get("DYN_SYSTEM_PORT", "")
    return "9090" if not text or text.startswith("-") else text


def parse(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> NodeFlags:
    """Split the arguments of `sgnode serve`. Raises NodeError naming the flag or the field."""
    made = parser(environ)
    file, written = _config_file(argv)
    known = set(made._option_string_actions)
    ours = [part for flag, value in written.items() if flag in known for part in _arguments(flag, value)]
    found, rest = made.parse_known_args(ours)
    if rest:
        raise NodeError(f"--config {file}: {rest[0]}: expected one value")
    found, rest = made.parse_known_args(_model_flag(argv), found)
    return NodeFlags(
        name=_name(found.name),
        runtime_dir=found.runtime_dir,
        agents=found.agents,
        frontend=found.frontend,
        http_host=found.http_host,
        http_port=found.http_port,
        system_host=environ.get("DYN_SYSTEM_HOST", "127.0.0.1"),
        system_port=found.system_port,
        drain_grace=found.drain_grace,
        drain_timeout=found.drain_timeout,
        hang_timeout=found.hang_timeout,
        health=health.read(environ),
        group_port=found.group_port,
        group_key_file=found.group_key_file,
        group_deadline=found.group_deadline,
        synthetic=found.synthetic,
        media={
            "max_items": found.media_max_items,
            "max_pixels": found.media_max_megapixels * 1_000_000,
            "timeout": found.media_timeout,
            "memory_bytes": found.media_memory_mb << 20,
        },
        console=found.console,
        log_format=found.log_format,
        worker_argv=_model_flag(rest),
        worker_file={flag: value for flag, value in written.items() if flag not in known},
        config_file=file,
    )


def _name(text: str) -> str:
    if not text or len(text) > 32 or not all(c.isalnum() or c in "-_." for c in text) or text.startswith("."):
        raise NodeError(f"--name: expected 1 to 32 letters, digits, '-', '_' or '.', got {text!r}")
    return text


def _model_flag(argv: Sequence[str]) -> list[str]:
    """``MODEL`` as the first argument means ``--model-path MODEL``."""
    if argv and not argv[0].startswith("-"):
        return ["--model-path", *argv]
    return list(argv)


def _config_file(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """--config and what is in it, by flag, in the file's order; ("", {}) without one."""
    made = Parser(add_help=False, allow_abbrev=False)
    made.add_argument("--config", default="")
    file: str = made.parse_known_args(list(argv))[0].config
    if not file:
        return "", {}
    import yaml

    try:
        loaded = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise NodeError(f"--config {file}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise NodeError(f"--config {file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict | None):
        raise NodeError(f"--config {file}: expected a mapping of flags to values, got {type(loaded).__name__}")
    written = {_flag(str(key)): value for key, value in (loaded or {}).items()}
    if "--config" in written:
        raise NodeError(f"--config {file}: config: a configuration file can't name another one")
    return file, written


def _flag(key: str) -> str:
    return "--model-path" if key in ("model", "MODEL") else "--" + key.lstrip("-").replace("_", "-")


def _arguments(flag: str, value: Any) -> list[str]:
    """A value of the file as arguments of one of the node's own flags."""
    match value:
        case None:
            return []
        case bool():
            return [flag if value else f"--no-{flag[2:]}"]
        case dict():
            return [flag, ",".join(f"{key}={item}" for key, item in value.items())]
    return [flag, str(value)]
