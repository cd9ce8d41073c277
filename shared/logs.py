"""Logging of the node's processes: one format, one line an event, to stderr (supervisord keeps the files)."""

import logging
import os

FORMAT = "%(asctime)s %(levelname)s {process}: %(message)s"


def setup(process: str) -> None:
    """Configure the root logger of a process. The level comes from SGNODE_LOG (default INFO)."""
    logging.basicConfig(level=os.environ.get("SGNODE_LOG", "INFO").upper(), format=FORMAT.format(process=process), force=True)
