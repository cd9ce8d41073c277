"""Entry point of the relay: hands the engine's KV use to the agents and answers scrapes until SIGTERM."""

import asyncio
import sys

from procs.relay.relay import Relay
from shared import config as configuration
from shared import logs
from shared.errors import NodeError


def main() -> int:
    logs.setup("relay")
    try:
        config = configuration.load()
    except NodeError as error:
        print(error, file=sys.stderr)
        return 2
    asyncio.run(Relay(config).run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
