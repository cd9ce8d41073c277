"""Where media come from: data: URLs, files below DYN_MM_LOCAL_PATH, HTTP under Dynamo's URL policy. Bytes come out."""

import asyncio
import binascii
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.config import MediaLimits
from shared.errors import Code, RequestError

Hold = Callable[[int], None]
"""Told of bytes before or while they come, in the event loop. Raises RequestError when they are too many."""
ESCAPED = {"%2B": "+", "%2b": "+", "%2F": "/", "%2f": "/", "%3D": "=", "%3d": "="}
"""What base64 has that some clients escape. Python's own unescaping holds up everything else for 0.3 s on 15 MB."""


class Sources:
    """Reads references. An item is bounded by DYN_MM_MAX_FILE_SIZE_MB, a data: URL by DYN_MM_MAX_DATA_URL_MB."""

    def __init__(self, limits: MediaLimits) -> None:
        self._limits = limits
        self._client: Any = None

    async def read(self, url: str, hold: Hold) -> bytes:
        """What a reference stands for. Raises RequestError, INVALID except for an operator's mistake."""
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            hold(len(url) * 3 // 4)
            return await asyncio.to_thread(_inline, url)
        from dynamo.common.http import HttpConfigurationError, HttpError, HttpStatusError, HttpTimeoutError
        from dynamo.common.http.url_validator import (
            UrlValidationError,
            UrlValidationPolicy,
            describe_error_detail,
            describe_media_source,
            validate_media_reference,
        )

        policy = UrlValidationPolicy.from_env()
        try:
            async with asyncio.timeout(self._limits.timeout):
                if scheme in ("http", "https"):
                    return await self._fetch(url, policy, hold)
                where = Path(await validate_media_reference(url, policy))
                hold(size := await asyncio.to_thread(_size, where))
                return await asyncio.to_thread(_file, where, size)
        except HttpConfigurationError as error:
            raise RequestError(Code.INTERNAL, describe_error_detail(str(error), 400)) from None
        except UrlValidationError as error:
            why = str(error)
        except (TimeoutError, HttpTimeoutError):
            why = f"no answer within {self._limits.timeout:g} s"
        except HttpStatusError as error:
            why = f"its server answers {error.status}"
        except (HttpError, OSError, ValueError) as error:  # ValueError: no URL at all
            why = describe_error_detail(str(error) or type(error).__name__)
        raise RequestError(Code.INVALID, f"{describe_media_source(url)}: {why}")

    async def _fetch(self, url: str, policy: Any, hold: Hold) -> bytes:
        from dynamo.common.http.media_reference import max_media_bytes

        if self._client is None:
            self._client = _client(self._limits.domains)
        bound = _Watched(max_media_bytes()).by(hold)
        data: bytes = await self._client.fetch_bytes(url, self._limits.timeout, policy=policy, max_bytes=bound)
        return data


class _Watched(int):
    """A bound that learns how far a body has come: Dynamo's client compares the two at each piece (1.6.1, collect_capped)."""

    def by(self, hold: Hold) -> "_Watched":
        self._hold, self._seen = hold, 0
        return self

    def __lt__(self, total: int) -> bool:
        self._hold(total - self._seen)
        self._seen = total
        return super().__lt__(total)


def _client(domains: list[str]) -> Any:
    """Dynamo's HTTP client; with --allowed-media-domains (SGLang's) each hop has to be one of them."""
    from dynamo.common.http import AiohttpClient, get_default_client
    from dynamo.common.http.url_validator import UrlValidationError

    default = get_default_client()  # also gives its variables' older names a meaning
    if not domains:
        return default
    allowed = {name.lower() for name in domains}

    class Listed(AiohttpClient):  # type: ignore[misc]
        async def _fetch_body_or_redirect(self, url: str, *rest: Any, **options: Any) -> Any:
            if (urllib.parse.urlsplit(url).hostname or "").lower() not in allowed:
                raise UrlValidationError(f"media are taken from {', '.join(sorted(allowed))} only (--allowed-media-domains)")
            return await super()._fetch_body_or_redirect(url, *rest, **options)

    return Listed()


def _inline(url: str) -> bytes:
    """A data: URL's content. Raises RequestError(INVALID)."""
    import pybase64  # SGLang's: 16 MB take 1 ms, and 30 ms with Python's own, in which no other thread runs
    from dynamo.common.http.url_validator import max_data_url_bytes

    most = max_data_url_bytes()
    if len(url) > most:
        raise RequestError(Code.INVALID, f"a data: URL of {len(url)} bytes, {most} at most (DYN_MM_MAX_DATA_URL_MB)")
    head, comma, body = url.partition(",")
    if not comma or head.rpartition(";")[2].strip().lower() != "base64":
        raise RequestError(Code.INVALID, "a data: URL without `;base64,`")
    for escape, character in ESCAPED.items() if "%" in body else ():
        body = body.replace(escape, character)
    try:
        return pybase64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(Code.INVALID, f"a data: URL that is no base64: {error}") from None


def _size(path: Path) -> int:
    """Bytes of a file inside DYN_MM_LOCAL_PATH. Raises OSError, and ValueError for what is too large or no file."""
    from dynamo.common.http.media_reference import max_media_bytes

    if not path.is_file():  # a pipe or a device would never end
        raise ValueError("not a file")
    if (size := path.stat().st_size) > (most := max_media_bytes()):
        raise ValueError(f"more than {most} bytes (DYN_MM_MAX_FILE_SIZE_MB)")
    return size


def _file(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)
