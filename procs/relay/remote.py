"""Metrics text of the agents' own Dynamo runtimes (``dynamo_component_*``), fetched from their loopback ports."""

import logging

import aiohttp

from procs.relay.aside import READ_SECONDS
from procs.relay.text import Labels


class Agents:
    """One HTTP session for all of them; made in the loop at the first fetch."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._labels: dict[str, Labels] = {}

    async def fetch(self, name: str, url: str, worker_id: str) -> str | None:
        """The text at ``url``, each sample with its worker; None when the agent does not answer in time.

        Dynamo labels only some of its samples with the worker; without the label two agents would report the same series.
        """
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=READ_SECONDS))
        try:
            labels = {"worker_id": f"{int(worker_id):x}"}
            async with self._session.get(url) as answer:
                if answer.status != 200:
                    return None
                text = await answer.text()
        except (TimeoutError, aiohttp.ClientError, ValueError) as error:
            logging.debug("metrics of %s: %s", url, error)
            return None
        if name not in self._labels or self._labels[name].labels != labels:
            self._labels[name] = Labels(labels)
        add = self._labels[name].add
        return "\n".join(line if line.startswith("#") else add(line) for line in text.splitlines())

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()
