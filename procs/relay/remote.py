"""Metrics text of an agent's own Dynamo runtime (``dynamo_component_*``), fetched from its loopback port."""

import asyncio
import logging

import aiohttp

FETCH_SECONDS = 0.5
"""A scrape of the node must end within 1 s, whatever hangs."""


async def fetch(url: str) -> str:
    """The text at ``url``; empty when the agent does not answer in time."""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=FETCH_SECONDS)) as session,
            session.get(url) as answer,
        ):
            return await answer.text() if answer.status == 200 else ""
    except (TimeoutError, aiohttp.ClientError, asyncio.CancelledError) as error:
        logging.debug("metrics of %s: %s", url, error)
        return ""
