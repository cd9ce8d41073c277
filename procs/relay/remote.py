"""Metrics text of the agents' own Dynamo runtimes (``dynamo_component_*``), fetched from their loopback ports."""

import asyncio
import logging
from urllib.parse import urlsplit

from procs.relay.aside import READ_SECONDS
from procs.relay.text import Labels


class Agents:
    """Keeps each agent's labels from scrape to scrape."""

    def __init__(self) -> None:
        self._labels: dict[str, Labels] = {}

    async def fetch(self, name: str, url: str, worker_id: str) -> str | None:
        """The text at ``url``, each sample with its worker; None when the agent does not answer in time.

        Dynamo labels only some of its samples with the worker; without the label two agents would report the same series.
        """
        try:
            labels = {"worker_id": f"{int(worker_id):x}"}
            async with asyncio.timeout(READ_SECONDS):
                text = await _get(url)
        except (OSError, ValueError) as error:
            logging.debug("metrics of %s: %s", url, error)
            return None
        if text is None:
            return None
        if name not in self._labels or self._labels[name].labels != labels:
            self._labels[name] = Labels(labels)
        add = self._labels[name].add
        return "\n".join(line if line.startswith("#") else add(line) for line in text.splitlines())


async def _get(url: str) -> str | None:
    """What is at an http URL; None when its status is not 200. An HTTP library would be a quarter of this process's memory."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        # HTTP/1.0: the answer ends with the connection, and is not cut into chunks.
        writer.write(f"GET {parts.path} HTTP/1.0\r\nHost: {parts.netloc}\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    return body.decode() if head.split(b" ", 2)[1:2] == [b"200"] else None
