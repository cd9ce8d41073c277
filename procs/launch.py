"""What supervisord runs for each program: ties it to supervisord's life, narrows its environment, then becomes it.

``python -m procs.launch PROGRAM [INDEX]``; PROGRAM is a section of supervisor.conf, INDEX an agent's number.
"""

import os
import signal
import sys
from pathlib import Path

from shared import nixl
from shared.config import RUNTIME_DIR_VARIABLE, NodeConfig, load
from shared.environment import allowed
from shared.errors import NodeError
from shared.logs import NODE_VARIABLE, sglang_environment
from shared.prctl import signal_at_parents_death

PROGRAMS = ("engine", "agent", "frontend", "coordinator", "relay", "prober")
MODULES = {"engine": "procs.keeper", "frontend": "dynamo.frontend"}
"""Programs whose module is not ``procs.NAME``: the engine is started by its keeper, the frontend is Dynamo's."""

LOOPBACK = ("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST")
"""Where Dynamo's runtime listens (or what it advertises). Unset, it takes the host's outward address."""

FRONTEND_STOP_SECONDS = 60
"""For clients to take what is left of their streams after the agents have drained; supervisor.conf allows a little more."""


def interpreter() -> str:
    """This process's interpreter, in the virtual environment itself where that was reached through a link.

    An upgrade switches the link; what runs already must not import the rest of itself from the new version.
    """
    own = Path(sys.prefix).resolve() / "bin" / Path(sys.executable).name
    return str(own) if own.exists() and sys.prefix != sys.base_prefix else sys.executable


def command(program: str, index: int | None, config: NodeConfig) -> list[str]:
    """Arguments of a program, the interpreter first."""
    argv = [interpreter(), "-m", MODULES.get(program, f"procs.{program}")]
    if program == "agent":
        argv.append(str(index or 0))
    if program == "frontend":
        dynamo = config.dynamo
        argv += ["--http-host", config.http_host, "--http-port", str(config.http_port)]
        argv += ["--discovery-backend", dynamo.discovery_backend, "--request-plane", dynamo.request_plane]
        if dynamo.response_plane:
            argv += ["--response-plane", dynamo.response_plane]
        if dynamo.event_plane:
            argv += ["--event-plane", dynamo.event_plane]
    return argv


def environment(program: str, environ: dict[str, str], config: NodeConfig) -> dict[str, str]:
    """The environment of a program, from supervisord's."""
    publishes = program == "relay" and config.dynamo.use_kv_events
    stores = program == "agent" and config.role in ("image", "video")
    result = allowed("relay with KV events" if publishes else "agent with files" if stores else program, environ)
    if program in ("agent", "frontend") or publishes:
        # The system port is the prober's: Dynamo's runtime in each of these would bind it too.
        result.pop("DYN_SYSTEM_PORT", None)
        if config.dynamo.discovery_backend == "file":
            # One machine: nothing needs to listen wider. In a cluster the others must reach us, so Dynamo's default stays.
            for name in LOOPBACK:
                result.setdefault(name, "127.0.0.1")
    if program == "frontend":
        # A slow reader gets the end of its stream: Dynamo 1.6.1 would cut every connection after 5 s.
        result.setdefault("DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", str(FRONTEND_STOP_SECONDS))
    if program == "frontend" and config.media.frontend_decoding:
        result |= nixl.environment(result)
        paths = [result.get("LD_LIBRARY_PATH", ""), str(nixl.libraries() or "")]
        result["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    if program == "agent":
        # Any free port. The relay scrapes it, and whoever reads the model card fetches the tokenizer there: it must be
        # reachable wherever the requests are (0.0.0.0: Dynamo advertises the host's outward address).
        result["DYN_SYSTEM_PORT"] = "0"
        result["DYN_SYSTEM_HOST"] = result.get("DYN_TCP_RPC_HOST", "0.0.0.0")
    if program == "engine":
        result |= sglang_environment(result)
    # Colours belong on a terminal; this goes into a file.
    result.setdefault("DYN_SDK_DISABLE_ANSI_LOGGING", "1")
    result[NODE_VARIABLE] = config.name
    # The mark of an engine's processes (procs/keeper/life.py): inherited from outside it would make all of us its leftovers.
    result.pop("SGNODE_INCARNATION", None)
    result[RUNTIME_DIR_VARIABLE] = config.runtime_dir
    return result


def main(argv: list[str]) -> int:
    """Become the program. Returns (exit code 2) only for a wrong call."""
    parent = os.getppid()
    try:
        if not 1 <= len(argv) <= 2 or argv[0] not in PROGRAMS:
            raise NodeError(f"usage: python -m procs.launch PROGRAM [INDEX]; got {argv}")
        program, index = argv[0], int(argv[1]) if len(argv) == 2 else None
        config = load()
    except (NodeError, ValueError) as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2
    # Sockets and files of the node are its user's only; supervisord 4.3 sets its umask only when it daemonizes.
    os.umask(0o077)
    # Without supervisord nothing may go on: its successor would start a second of each.
    signal_at_parents_death(signal.SIGUSR1 if program == "engine" else signal.SIGKILL)
    if os.getppid() != parent:
        return 1
    args = command(program, index, config)
    os.execve(args[0], args, environment(program, dict(os.environ), config))
    return 0  # not reached: execve does not return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
