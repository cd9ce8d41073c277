"""Entry point of the keeper: one life of the engine, then exit (0: asked to stop, otherwise the engine died, or never was)."""

import logging
import os
import sys

from procs.keeper.keeper import keep
from shared import config, logs
from shared.config import LEFT_BEHIND_EXIT
from shared.errors import NodeError


def main() -> int:
    logs.setup("keeper")
    try:
        node = config.load()
        stop_wait = float(os.environ.get("SGNODE_ENGINE_STOPWAIT", "30"))
        return keep(node, [sys.executable, "-m", "procs.engine"], stop_wait)
    except TimeoutError as error:
        logging.error("%s", error)
        return LEFT_BEHIND_EXIT
    except (NodeError, OSError) as error:
        logging.error("%s", error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
