"""`sgnode serve`: checks everything, writes the runtime directory, then becomes supervisord."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from procs.cli import flags, runtime_dir
from procs.cli.flags import NodeFlags
from shared import config as configuration
from shared import environment, roles
from shared.config import DISCOVERY_DIR, RUNTIME_DIR_VARIABLE, SUPERVISOR_CONF, NodeConfig
from shared.errors import NodeError

CPU_DEFAULTS = {
    "--device": ["cpu"],
    "--attention-backend": ["torch_native"],
    "--sampling-backend": ["pytorch"],
    "--disable-cuda-graph": [],
    "--max-total-tokens": ["16384"],
    "--max-running-requests": ["64"],
    "--mem-fraction-static": ["0.2"],
    "--page-size": ["16"],
    "--skip-server-warmup": [],
}
"""On a host without a GPU, for flags that were not given: what SGLang 0.5.23 needs to run there at all."""
STOP_MARGIN_SECONDS = 15
"""Between what a process may need for its stop and supervisord's SIGKILL."""
ENGINE_STOP_SECONDS = 30
"""From the keeper's SIGTERM to its SIGKILL: the agents have drained before, so the engine has nothing left to finish."""


def main(argv: list[str]) -> int:
    """Run a node. Does not return when it starts. Raises NodeError, leaving nothing behind, when it can't."""
    if any(word in ("-h", "--help") for word in argv):
        flags.parser().print_help()
        return 0
    if "--help-all" in argv:
        flags.parser().print_help()
        print("\n" + _check_child({"help": True})["help"])
        return 0
    found = flags.parse(argv)
    directory = (found.runtime_dir or runtime_dir.default(found.name)).absolute()
    runtime_dir.check_length(directory, ["coordinator", *(f"agent:{i}" for i in range(found.agents))])
    model = _model(found.worker_argv)
    if model is None:
        raise NodeError("MODEL: expected a model directory or name as the first argument (or --model-path)")
    if found.synthetic is None and re.match(r"[./~]", model) and not Path(model).expanduser().is_dir():
        raise NodeError(f"MODEL {model}: no such directory")
    lock = runtime_dir.claim(directory, found.name)
    try:
        config = resolve(found, directory)
    except BaseException:
        runtime_dir.abandon(directory, lock)
        raise
    runtime_dir.prepare(directory)
    configuration.save(config)
    (directory / SUPERVISOR_CONF).write_text(process_tree(config))
    environ = _environment(config)
    os.set_inheritable(lock, True)
    if found.console and "NOTIFY_SOCKET" not in os.environ:
        # A child of the process that is about to become supervisord; it leaves with it.
        subprocess.Popen([sys.executable, "-m", "procs.cli.console"], env=environ, stdin=subprocess.DEVNULL)
    os.umask(0o077)
    argv = [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(directory / SUPERVISOR_CONF)]
    sys.stdout.flush()
    os.execve(sys.executable, argv, environ)
    return 1  # not reached: execve does not return


def _model(argv: list[str]) -> str | None:
    for index, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag in ("--model-path", "--model"):
            return value if equals else (argv[index + 1] if index + 1 < len(argv) else None)
    return None


def resolve(found: NodeFlags, directory: Path) -> NodeConfig:
    """The whole configuration, ports bound to numbers. Raises NodeError."""
    has = {argument.partition("=")[0] for argument in found.worker_argv}
    argv = list(found.worker_argv)
    if "--discovery-backend" not in has and "DYN_DISCOVERY_BACKEND" not in os.environ:
        argv += ["--discovery-backend", "file"]
    # Ports first: a wrong one is found in milliseconds, the child takes seconds.
    wanted = found.http_port if found.frontend is not False else 0
    http_port = _port("--http-port", found.http_host, wanted)
    system_port = _port("--system-port", found.system_host, found.system_port)
    if found.synthetic is not None:
        worker = _synthetic_worker(argv)
    else:
        if not has_gpu() and "--device" not in has:
            argv += [part for flag, values in CPU_DEFAULTS.items() if flag not in has for part in (flag, *values)]
        worker = _check_child({"argv": argv})
    dynamo = msgspec.convert(worker.pop("dynamo"), configuration.Dynamo)
    roles.find(worker["role"])
    frontend = found.frontend if found.frontend is not None else dynamo.discovery_backend == "file"
    return NodeConfig(
        name=found.name,
        runtime_dir=str(directory),
        version=version("sgnode"),
        engine="sglang" if found.synthetic is None else "synthetic",
        synthetic=found.synthetic,
        worker_argv=argv,
        dynamo=dynamo,
        agents=found.agents,
        frontend=frontend and worker.get("node_rank", 0) == 0,
        http_host=found.http_host,
        http_port=http_port,
        system_host=found.system_host,
        system_port=system_port,
        drain_grace=found.drain_grace,
        drain_timeout=found.drain_timeout,
        canary_wait=found.canary_wait,
        canary_timeout=found.canary_timeout,
        group_port=found.group_port,
        group_key_file=found.group_key_file,
        **worker,
    )


def has_gpu() -> bool:
    """A CUDA device, without importing torch."""
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def _port(flag: str, host: str, port: int) -> int:
    """The port, or a free one for 0. Raises NodeError naming the flag when it is taken."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise NodeError(f"{flag} {port}: {error.strerror} on {host}; pass another port, or 0 for any free one") from error


def engine_environment() -> dict[str, str]:
    """The environment of this process, with what SGLang needs on a host without a GPU."""
    environ = dict(os.environ)
    if not has_gpu():
        environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    return environ


def _check_child(request: dict[str, Any]) -> dict[str, Any]:
    """Ask procs.engine.check. Raises NodeError with its one line."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "procs.engine.check"],
        input=json.dumps(request),
        env=engine_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NodeError(f"the configuration could not be checked: {last} (is SGLang installed? see README)") from error
    if "error" in answer:
        raise NodeError(answer["error"])
    return answer


def _synthetic_worker(argv: list[str]) -> dict[str, Any]:
    """What the check child resolves, for the synthetic engine: Dynamo's defaults and three flags."""
    made = flags.Parser(add_help=False, allow_abbrev=False)
    made.add_argument("--model-path", required=True)
    made.add_argument("--served-model-name")
    made.add_argument("--discovery-backend", default=os.environ.get("DYN_DISCOVERY_BACKEND", "file"))
    made.add_argument("--namespace", default=os.environ.get("DYN_NAMESPACE", "dynamo"))
    known = made.parse_args(argv)
    return {
        "role": "aggregated",
        "model_path": known.model_path,
        "served_model_name": known.served_model_name or known.model_path,
        "dynamo": {"discovery_backend": known.discovery_backend, "namespace": known.namespace},
    }


def process_tree(config: NodeConfig) -> str:
    """supervisor.conf without the programs that this node doesn't have; each section keeps the comment above it."""
    text = files("procs").joinpath(SUPERVISOR_CONF).read_text()
    absent = set() if config.frontend else {"program:frontend"}
    if config.node_rank > 0:
        absent |= {"program:frontend", "program:agent"}
    blocks = text.split("\n\n")
    kept = [block for block in blocks if not any(re.search(rf"^\[{name}\]", block, re.MULTILINE) for name in absent)]
    return "\n\n".join(kept).rstrip("\n") + "\n"


def _environment(config: NodeConfig) -> dict[str, str]:
    """supervisord's environment: what its programs may get, and what supervisor.conf names."""
    environ = environment.allowed("supervisord", engine_environment())
    environ.update(
        {
            RUNTIME_DIR_VARIABLE: config.runtime_dir,
            "SGNODE_PYTHON": sys.executable,
            "SGNODE_AGENTS": str(config.agents),
            "SGNODE_AGENT_STOPWAIT": str(math.ceil(config.drain_grace + config.drain_timeout) + STOP_MARGIN_SECONDS),
            "SGNODE_ENGINE_STOPWAIT": str(ENGINE_STOP_SECONDS),
            "PYTHONUNBUFFERED": "1",
        }
    )
    if config.dynamo.discovery_backend == "file":
        environ.setdefault("DYN_FILE_KV", f"{config.runtime_dir}/{DISCOVERY_DIR}")
    return environ
