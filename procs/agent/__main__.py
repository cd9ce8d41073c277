"""Entry point of an agent: ``python -m procs.agent INDEX``. Exits 0 after a stop that was asked for."""

import logging
import os
import sys
from typing import NoReturn

import uvloop

from procs.agent.agent import Agent
from shared import config as configuration
from shared import logs
from shared.config import NodeConfig
from shared.errors import NodeError


async def _run(config: NodeConfig, index: int) -> NoReturn:
    """Ends the process, while everything still exists: the end of the loop and of Dynamo's runtime wait for threads of theirs."""
    code = 1
    try:
        await Agent(config, index).run()
        code = 0
    except Exception:
        logging.exception("the agent ends")
    finally:
        logging.shutdown()
        os._exit(code)


def main() -> int:
    """Run the agent. Exit code 2 with one line when it may not run here, 1 when Dynamo's runtime fails."""
    try:
        index = int(sys.argv[1]) if len(sys.argv) > 1 else 0
        config = configuration.load()
        if config.node_rank > 0:
            raise NodeError(f"agents run on node_rank 0 only; this is rank {config.node_rank} of {config.nnodes}")
        if not 0 <= index < config.agents:
            raise NodeError(f"agent {index}: this node has agents 0 to {config.agents - 1}")
    except (NodeError, ValueError) as error:
        print(f"agent: {error}", file=sys.stderr)
        return 2
    logs.setup(f"agent:{index}")
    uvloop.run(_run(config, index))
    return 0  # not reached: the process has ended


if __name__ == "__main__":
    sys.exit(main())
