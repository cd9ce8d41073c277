"""Entry point of the prober: canaries and the node's one HTTP port, until SIGTERM."""

import asyncio
import sys

from procs.prober.prober import Prober
from shared import config as configuration
from shared import logs
from shared.errors import NodeError


def main() -> int:
    """Exit code 2 with one line when the port can't be bound."""
    logs.setup("prober")
    try:
        asyncio.run(Prober(configuration.load()).run())
    except NodeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
