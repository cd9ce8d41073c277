"""`sgnode serve`: checks everything, writes the runtime directory, then becomes supervisord."""

import errno
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from procs.cli import flags, runtime_dir
from procs.cli.flags import NodeFlags
from procs.launch import interpreter
from procs.plugin.facts import uptime
from shared import config as configuration
from shared import environment, logs, roles
from shared import group_key as key
from shared.config import DISCOVERY_DIR, RUNTIME_DIR_VARIABLE, SUPERVISOR_CONF, TEMPORARY_DIR, MediaLimits, NodeConfig
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
    "--sleep-on-idle": [],
}
"""On a host without a GPU, for flags that were not given: what SGLang 0.5.23 needs to run there at all."""
CPU_DISAGGREGATED = {
    "prefill": {"--disaggregation-transfer-backend": ["mooncake_tcp"]},
    "decode": {
        "--disaggregation-transfer-backend": ["mooncake_tcp"],
        "--disaggregation-decode-retraction-backup": ["cpu_tensor"],
    },
}
"""The same by --disaggregation-mode: the KV cache goes over TCP, and nothing is kept in pinned memory."""
STOP_MARGIN_SECONDS = 15
"""Between what a process may need for its stop and supervisord's SIGKILL."""
GROUP_PORT_OFFSET = 100
"""From --dist-init-addr's port: SGLang 0.5.23 takes the next six for DP attention."""
ENGINE_STOP_SECONDS = 30
"""From the keeper's SIGTERM to its SIGKILL: the agents have drained before, so the engine has nothing left to finish."""


def main(argv: list[str]) -> int:
    """Run a node. Does not return when it starts. Raises NodeError, leaving nothing behind, when it can't."""
    if any(word in ("-h", "--help") for word in argv):
        flags.parser().print_help()
        return 0
    if "--version" in argv:
        print(f"sgnode {version('sgnode')}")
        return 0
    if "--help-all" in argv:
        flags.parser().print_help()
        print("\n" + _check_child({"help": True}, dict(os.environ))["help"])
        return 0
    found = flags.parse(argv)
    logs.ask(found.log_format)
    logs.check(os.environ)
    directory = (found.runtime_dir or runtime_dir.default(found.name)).absolute()
    runtime_dir.check_length(directory, ["coordinator", *(f"agent:{i}" for i in range(found.agents))])
    check_files(found)
    claim = runtime_dir.claim(directory, found.name)
    try:
        environ, notes = hardware(found)
        config = resolve(found, directory, environ)
        claim.prepare()
        configuration.save(config)
        (directory / SUPERVISOR_CONF).write_text(process_tree(config))
        _start(config, claim, environment_of(config, environ), found.console, notes)
    except BaseException as error:
        claim.abandon()
        if isinstance(error, OSError):
            raise NodeError(f"--runtime-dir {directory}: {error.strerror or error}") from error
        raise
    return 1  # not reached: execve does not return


def _start(config: NodeConfig, claim: runtime_dir.Claim, environ: dict[str, str], console: bool, notes: list[str]) -> None:
    """Become supervisord. The lock's descriptor goes with it, so that the lock lives as long as supervisord."""
    for note in notes:
        print(f"sgnode: {note}")
    sys.stdout.flush()
    os.umask(0o077)
    os.set_inheritable(claim.lock, True)
    # Under systemd nobody reads a console, and the main pid is the only one that may speak.
    child = None
    if console and "NOTIFY_SOCKET" not in os.environ:
        child = subprocess.Popen([sys.executable, "-m", "procs.cli.console"], env=environ, stdin=subprocess.DEVNULL)
    command = [interpreter(), "-m", "supervisor.supervisord", "-n", "-c", str(config.path / SUPERVISOR_CONF)]
    try:
        os.execve(command[0], command, environ)
    except OSError:
        if child is not None:
            child.kill()
        raise


def check_files(found: NodeFlags) -> None:
    """What can be seen to be missing without asking SGLang. Raises NodeError naming the argument."""
    model = _given(found, "--model-path", "--model")
    if model is None and not _has(found, "--disagg-config") and "DYN_SGL_DISAGG_CONFIG" not in os.environ:
        raise NodeError("MODEL: expected a model directory or name as the first argument (or --model-path)")
    # NAME and OWNER/NAME may be on a hub; anything else that looks like a path is one.
    if model is not None and found.synthetic is None and is_path(model) and not Path(model).exists():
        raise NodeError(f"MODEL {model}: no such directory")
    key.load(found.group_key_file)


def is_path(model: str) -> bool:
    return "://" not in model and (model[0:1] in "./~" or model.endswith("/") or model.count("/") > 1)


def _given(found: NodeFlags, *names: str) -> str | None:
    """The value that a worker flag has in the end: the last on the command line, else the file's."""
    value = value_of(found.worker_argv, *names)
    return value or next((str(found.worker_file[name]) for name in names if found.worker_file.get(name) is not None), None)


def value_of(argv: list[str], *names: str) -> str | None:
    """The value of a flag, given under any of these names: the last one wins."""
    value = None
    for index, argument in enumerate(argv):
        flag, equals, after = argument.partition("=")
        if flag in names:
            value = after if equals else (argv[index + 1] if index + 1 < len(argv) else None)
    return value


def _has(found: NodeFlags, flag: str) -> bool:
    return flag in found.worker_file or any(argument.partition("=")[0] == flag for argument in found.worker_argv)


def hardware(found: NodeFlags) -> tuple[dict[str, str], list[str]]:
    """The environment for SGLang on this host, and what to say about it; without a GPU, CPU_DEFAULTS join the arguments."""
    if found.synthetic is not None:
        return dict(os.environ), []
    notes = []
    if not has_gpu() and not _has(found, "--device"):
        defaults = {**CPU_DEFAULTS, **CPU_DISAGGREGATED.get(str(_given(found, "--disaggregation-mode")), {})}
        added = [part for flag, values in defaults.items() if not _has(found, flag) for part in (flag, *values)]
        found.worker_argv += added
        notes.append(f"no GPU here, so these are added (pass --device to choose yourself): {' '.join(added)}")
    return engine_environment(_given(found, "--device")), notes


def engine_environment(device: str | None = None) -> dict[str, str]:
    """The environment of this process, with what SGLang needs to run on a CPU if that is the device (None: this host's)."""
    environ = dict(os.environ)
    if device == "cpu" or (device is None and not has_gpu()):
        environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    return environ


def resolve(
    found: NodeFlags, directory: Path, environ: dict[str, str], *, probe: bool = True, timeout: float | None = None
) -> NodeConfig:
    """The whole configuration, ports bound to numbers. ``environ``: what SGLang gets. Raises NodeError.

    ``probe=False``: ports stay as they were given, taken or not (`sgnode doctor` says by whom). ``timeout``: of SGLang's check.
    """
    begun = time.time() - (uptime(os.getpid()) or 0.0)
    discovery = _given(found, "--discovery-backend") or environ.get("DYN_DISCOVERY_BACKEND")
    if discovery is None:
        discovery = "file"
        found.worker_argv += ["--discovery-backend", discovery]
    wants_frontend = found.frontend if found.frontend is not None else discovery == "file"
    wants_frontend = wants_frontend and _given(found, "--node-rank") in (None, "0")
    # Ports first: a wrong one is found in milliseconds, the child takes seconds.
    http_port, system_port = _ports(found, wants_frontend) if probe else (found.http_port, found.system_port)
    if found.synthetic is not None:
        worker = _synthetic_worker(found)
    else:
        request = {"argv": found.worker_argv, "file": found.worker_file, "config_file": found.config_file}
        if found.console:
            print("sgnode: checking the configuration with SGLang's own parser (some seconds)", flush=True)
        worker = _check_child(request, environ, timeout)
    dynamo = msgspec.convert(worker.pop("dynamo"), configuration.Dynamo)
    environ.update(worker.pop("environment", {}))
    roles.find(worker["role"])
    agents = _agents(found, worker.pop("gateway_workers", None))
    found.group_port = group_port(found, worker, probe=probe)
    return NodeConfig(
        name=found.name,
        runtime_dir=str(directory),
        version=version("sgnode"),
        engine="sglang" if found.synthetic is None else "synthetic",
        synthetic=found.synthetic,
        dynamo=dynamo,
        agents=agents,
        frontend=wants_frontend,
        http_host=found.http_host,
        http_port=http_port,
        system_host=found.system_host,
        system_port=system_port,
        drain_grace=found.drain_grace,
        drain_timeout=found.drain_timeout,
        hang_timeout=found.hang_timeout,
        media=MediaLimits(**found.media, **worker.pop("media", {})),
        **found.health,
        group_port=found.group_port,
        group_key_file=None if found.group_key_file is None else str(Path(found.group_key_file).absolute()),
        group_deadline=found.group_deadline,
        node_id=uuid.uuid4().hex,
        begun=begun,
        checked=time.time(),
        **worker,
    )


def _agents(found: NodeFlags, gateway_workers: int | None) -> int:
    """--gateway-workers N is the incumbent's name for N agents. Raises NodeError when both are given and differ."""
    if gateway_workers is None:
        return found.agents
    if found.agents not in (1, gateway_workers):
        raise NodeError(f"--agents {found.agents}: differs from --gateway-workers {gateway_workers}; they are the same thing")
    return gateway_workers


def group_port(found: NodeFlags, worker: dict[str, Any], *, probe: bool = True) -> int | None:
    """Where the nodes of a group meet; None for a node that is alone. Raises NodeError naming the flag."""
    nnodes, rank = worker.get("nnodes", 1), worker.get("node_rank", 0)
    if not 0 <= rank < nnodes:
        raise NodeError(f"--node-rank {rank}: expected 0 to {nnodes - 1} with --nnodes {nnodes}")
    if nnodes == 1:
        return None
    if not worker.get("dist_init_addr"):
        raise NodeError(f"--nnodes {nnodes}: expected --dist-init-addr HOST:PORT, an address of rank 0 that every node reaches")
    try:
        host, dist_port = configuration.split_address(worker["dist_init_addr"])
    except ValueError as error:
        raise NodeError(f"--dist-init-addr: {error}") from error
    port = dist_port + GROUP_PORT_OFFSET if found.group_port is None else found.group_port
    if not 0 < port < 65536:
        raise NodeError(f"--group-port: expected a port from 1 to 65535, got {port}; every node must know it")
    if rank == 0 and probe:
        try:
            bound = _bound("--group-port", "--dist-init-addr", host, port)
        except NodeError as error:
            if str(error).startswith("--dist-init-addr"):
                raise NodeError(f"{error}; rank 0 runs where it points to (on the others pass --node-rank)") from error
            raise NodeError(f"--group-port {port}: in use on {host}: another leader, or another program") from error
        bound.close()
    return port


def has_gpu() -> bool:
    """A CUDA device, without importing torch."""
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def _ports(found: NodeFlags, frontend: bool) -> tuple[int, int]:
    """The frontend's and the system port, 0 made a number. Raises NodeError naming the flag of one that is taken."""
    system = _bound("--system-port", "DYN_SYSTEM_HOST", found.system_host, found.system_port)
    if not frontend:
        with system:
            return found.http_port or 8000, int(system.getsockname()[1])
    # Both are bound at once, so that they differ.
    with system, _bound("--http-port", "--http-host", found.http_host, found.http_port) as http:
        return int(http.getsockname()[1]), int(system.getsockname()[1])


def _bound(flag: str, host_flag: str, host: str, port: int) -> socket.socket:
    probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((host, port))
        probe.listen(1)
    except OSError as error:
        probe.close()
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise NodeError(f"{host_flag} {host}: not an address of this machine") from error
        raise NodeError(f"{flag} {port}: {error.strerror} on {host}; pass another port, or 0 for any free one") from error
    return probe


def _check_child(request: dict[str, Any], environ: dict[str, str], timeout: float | None = None) -> dict[str, Any]:
    """Ask procs.engine.check. Raises NodeError with its one line, or when there is no answer within ``timeout`` seconds."""
    # SGLang and Dynamo leave files in TMPDIR when they are only asked to parse.
    with tempfile.TemporaryDirectory(prefix="sgnode-check-") as temporary:
        try:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "procs.engine.check"],
                input=json.dumps(request, default=str),
                env={**environ, "TMPDIR": temporary},
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as late:
            raise NodeError(f"the configuration could not be checked: no answer within {timeout:g} s") from late
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NodeError(f"the configuration could not be checked: {last} (is SGLang installed? see README)") from error
    if "error" in answer:
        raise NodeError(answer["error"])
    return answer


def _synthetic_worker(found: NodeFlags) -> dict[str, Any]:
    """What the check child resolves, for the synthetic engine: Dynamo's defaults and a few flags."""
    made = flags.Parser(add_help=False, allow_abbrev=False)
    made.add_argument("--model-path", required=True)
    made.add_argument("--served-model-name")
    made.add_argument("--discovery-backend", default=os.environ.get("DYN_DISCOVERY_BACKEND"))
    made.add_argument("--namespace", default=os.environ.get("DYN_NAMESPACE", "dynamo"))
    for flag, default in (("--tp-size", 1), ("--nnodes", 1), ("--node-rank", 0)):
        made.add_argument(flag, type=int, default=default)
    made.add_argument("--dist-init-addr")
    made.add_argument("--engine-request-limit", type=int)
    argv = [*(part for flag, value in found.worker_file.items() for part in (flag, str(value))), *found.worker_argv]
    known = made.parse_args(argv)
    served = known.served_model_name or known.model_path
    return {
        "worker_argv": argv,
        "role": "aggregated",
        "model_path": known.model_path,
        "served_model_name": served,
        **{name: getattr(known, name) for name in ("tp_size", "nnodes", "node_rank", "dist_init_addr")},
        "group_facts": {"model": served, "tp_size": str(known.tp_size), "nnodes": str(known.nnodes)},
        "dynamo": {
            "discovery_backend": known.discovery_backend,
            "namespace": known.namespace,
            "engine_request_limit": known.engine_request_limit,
        },
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


def environment_of(config: NodeConfig, environ: dict[str, str]) -> dict[str, str]:
    """supervisord's environment: what of ``environ`` its programs may get, and what supervisor.conf names."""
    result = environment.allowed("supervisord", environ)
    result.update(
        {
            RUNTIME_DIR_VARIABLE: config.runtime_dir,
            "SGNODE_PYTHON": sys.executable,
            "SGNODE_AGENTS": str(config.agents),
            "SGNODE_AGENT_STOPWAIT": str(math.ceil(config.drain_grace + config.drain_timeout) + STOP_MARGIN_SECONDS),
            "SGNODE_ENGINE_STOPWAIT": str(ENGINE_STOP_SECONDS),
            "PYTHONUNBUFFERED": "1",
            # What a program leaves in its temporary directory goes with the node.
            "TMPDIR": f"{config.runtime_dir}/{TEMPORARY_DIR}",
        }
    )
    if config.dynamo.discovery_backend == "file":
        result.setdefault("DYN_FILE_KV", f"{config.runtime_dir}/{DISCOVERY_DIR}")
    return result
