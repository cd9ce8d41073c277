"""Is etcd there? Asked before Dynamo 1.6.1's runtime is made, which waits for it in native code without giving up the GIL."""

import asyncio
import contextlib
from collections.abc import Mapping
from urllib.parse import urlsplit

from shared import etcd

CONNECT_SECONDS = 2.0


def endpoints(environ: Mapping[str, str]) -> list[tuple[str, int]]:
    """Host and port of each of ETCD_ENDPOINTS, or etcd's default."""
    places = [urlsplit(url) for url in etcd.urls(environ)]
    return [(place.hostname or "localhost", place.port or etcd.PORT) for place in places]


async def reachable(host: str, port: int) -> bool:
    """True when something accepts a connection there within CONNECT_SECONDS."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
        writer.close()
        return True
    return False
