"""Entry point of the coordinator."""

import asyncio
import logging
import sys

from procs.coordinator.coordinator import Coordinator
from shared import config, logs
from shared.errors import NodeError


def main() -> int:
    logs.setup("coordinator")
    try:
        asyncio.run(Coordinator(config.load()).run())
    except NodeError as error:
        logging.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
