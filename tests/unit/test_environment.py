"""What an agent that stores files gets of proxies, and that its media client's address policy holds with them."""

import asyncio
import socket

import pytest

from shared.environment import PROXIES, allowed


def test_agents_with_files_get_the_proxies_and_other_agents_do_not() -> None:
    environ = dict.fromkeys(PROXIES, "http://proxy.example:3128")
    assert allowed("agent with files", environ) == allowed("supervisord", environ) == environ
    assert allowed("agent", environ) == {}


def test_a_proxy_is_no_way_around_the_media_clients_address_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynamo.common.http import AiohttpClient, HttpConfigurationError
    from dynamo.common.http.url_validator import UrlValidationError, UrlValidationPolicy

    for name in ("DYN_MM_TRUST_EGRESS_PROXY", "DYN_MM_ALLOW_INTERNAL", *PROXIES):
        monkeypatch.delenv(name, raising=False)

    async def fetch(url: str) -> bytes:
        client = AiohttpClient()
        try:
            return bytes(await client.fetch_bytes(url, 5.0, policy=UrlValidationPolicy.from_env(), max_bytes=100))
        finally:
            await client.close()

    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in PROXIES[:2]:
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        with pytest.raises(HttpConfigurationError, match="egress proxy"):
            asyncio.run(fetch("https://93.184.216.34/x.png"))
        with pytest.raises(UrlValidationError):
            asyncio.run(fetch("https://10.0.0.1/x.png"))
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has come to it
            proxy.accept()
