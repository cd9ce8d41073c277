"""Entry point of the engine process: build the backend while beating, then serve requests until told to stop."""

import asyncio
import logging
import os
import signal
import sys

import zmq

from procs.engine import imports
from procs.engine.backend import Backend
from procs.engine.load_progress import LoadProgress
from procs.engine.service import Service
from shared import config as configuration
from shared import logs, sockets
from shared.config import LOG_DIR, NodeConfig
from shared.errors import NodeError
from shared.heart import Heart
from shared.roles import find
from shared.state import State


def build(config: NodeConfig, incarnation: int) -> Backend:
    """Build the backend; blocks until the engine can take requests. Imports SGLang only for the real one."""
    if config.engine == "synthetic":
        from procs.engine.synthetic import SyntheticBackend

        return SyntheticBackend(config, incarnation)
    match find(config.role, text=config.text_mode).engine:
        case "encode":
            from procs.engine.adapter.encoder import EncodeBackend

            return EncodeBackend(config, incarnation)
        case "diffuse":
            from procs.engine.adapter.diffusion import DiffusionBackend

            return DiffusionBackend(config, incarnation)
    from procs.engine.adapter import SglangBackend

    return SglangBackend(config, incarnation)


async def serve(config: NodeConfig, backend: Backend, heart: Heart, incarnation: int, epoch: int) -> None:
    """Serve until SIGTERM."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
    router = sockets.router(context, config.path, sockets.REQUESTS)
    service = Service(backend, router, heart, incarnation=incarnation, epoch=epoch)
    backend.start(service, stopping.set)
    heart.set(State.WARMING, waiting_for="the first requests through the engine")
    await backend.warm()
    service.start()
    facts = backend.facts
    heart.set(State.READY, f"{facts.engine} {facts.version}, loaded in {facts.load_seconds:.1f} s", info=backend.info)
    logging.info("ready: incarnation %d, %s", incarnation, heart.beat.detail)
    await stopping.wait()
    heart.set(State.STOPPED, "stopping")
    service.close()


def main() -> int:
    imports.hold_collector()
    logs.setup("engine")
    try:
        config = configuration.load()
    except NodeError as error:
        print(error, file=sys.stderr)
        return 2
    incarnation = int(os.environ.get("SGNODE_INCARNATION", "1"))
    epoch = int(os.environ.get("SGNODE_EPOCH", "0"))
    heart = Heart(config.path, "engine", incarnation=incarnation, epoch=epoch)
    # While loading there is nothing to finish: leave at once, the keeper ends the children.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    progress = LoadProgress(config.path / LOG_DIR / "engine.log", heart.marks)

    def loading() -> None:
        words = ": ".join(filter(None, (f"loading {config.served_model_name}", progress.look())))
        heart.set(State.LOADING, words, waiting_for="weights and warm-up")

    loading()
    with heart.beating_from_a_thread(loading):
        backend = build(config, incarnation)
    progress.look()
    imports.resume_collector()
    # Also while it serves: a loop that is blocked for some seconds is no dead engine (the Beat's loop_lag says for how long).
    with heart.beating_from_a_thread():
        asyncio.run(serve(config, backend, heart, incarnation, epoch))
    backend.close()
    heart.close()
    logging.shutdown()
    # Interpreter teardown of torch and its threads takes seconds and frees nothing that the exit doesn't.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
