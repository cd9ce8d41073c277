"""Metrics text of an agent's own Dynamo runtime (``dynamo_component_*``), fetched from its loopback port."""

import logging

import aiohttp

from procs.relay.text import labelled

FETCH_SECONDS = 0.5
"""A scrape of the node must end within 1 s, whatever hangs."""


async def fetch(url: str, worker_id: str) -> str:
    """The text at ``url``; empty when the agent does not answer in time.

    Dynamo labels only some of its samples with the worker; without the label two agents would report the same series.
    """
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=FETCH_SECONDS)) as session,
            session.get(url) as answer,
        ):
            return _of_worker(await answer.text(), worker_id) if answer.status == 200 else ""
    except (TimeoutError, aiohttp.ClientError, ValueError) as error:
        logging.debug("metrics of %s: %s", url, error)
        return ""


def _of_worker(text: str, worker_id: str) -> str:
    labels = {"worker_id": f"{int(worker_id):x}"}
    return "\n".join(line if line.startswith("#") else labelled(line, labels) for line in text.splitlines())
