"""Entry point of an agent: ``python -m procs.agent INDEX``. Exits 0 after a stop that was asked for."""

import asyncio
import logging
import os
import sys

from procs.agent.agent import Agent
from shared import config as configuration
from shared import logs
from shared.errors import NodeError


def main() -> int:
    """Run the agent. Exit code 2 with one line when it may not run here."""
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
    asyncio.run(Agent(config, index).run())
    logging.shutdown()
    # Dynamo's runtime threads would hold the interpreter's exit for seconds.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
