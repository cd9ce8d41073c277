"""Media of a request, fetched and looked at before anything of it reaches the engine: Dynamo's URL policy, the operator's bounds.

SGLang 0.5.23 would open files and fetch from anywhere, as dynamo.sglang 1.6.1 lets it do with images and audio. The engine of
this node gets bytes only.
"""

import asyncio
import base64
import binascii
import io
import urllib.parse
import warnings
from pathlib import Path
from typing import Any

from shared.config import MediaLimits
from shared.errors import Code, RequestError
from shared.roles.media import KINDS
from shared.roles.role import Media

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
"""Image formats that are decoded at all."""


class Intake:
    """Fetches media, within bounds that hold for a request and for all of this agent's requests together."""

    def __init__(self, limits: MediaLimits) -> None:
        self._limits = limits
        self._client: Any = None
        self.held = 0
        """Bytes of media that were fetched and whose requests the engine has not answered."""

    async def gather(self, data: Any) -> Media:
        """Everything in a request's ``multi_modal_data``. ``release`` it when the engine has it.

        Raises RequestError: INVALID for what the client has to change, OVERLOADED past the bound of all requests together.
        """
        items = _items(data)
        self._count(items)
        media = Media([kind for kind, _ in items], [])
        tasks = [asyncio.ensure_future(self._one(kind, item, media)) for kind, item in items]
        try:
            media.blobs += await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.release(media)
            raise
        return media

    def release(self, media: Media) -> None:
        """Its bytes are the engine's now, or nobody's. Doing it twice does no harm."""
        self.held -= media.held
        media.held = 0
        media.blobs.clear()

    def _count(self, items: list[tuple[str, Any]]) -> None:
        if len(items) > self._limits.max_items:
            raise RequestError(Code.INVALID, f"{len(items)} images, videos and audio clips: {self._limits.max_items} at most")
        for kind, most in self._limits.per_kind.items():
            found = sum(1 for each, _ in items if each == kind)
            if found > most:
                raise RequestError(Code.INVALID, f"{found} items of type {kind}: {most} at most")

    def _hold(self, media: Media, size: int) -> None:
        if self.held + size > self._limits.memory_bytes:
            words = f"media of {self.held >> 20} MB wait for the engine; {self._limits.memory_bytes >> 20} MB at most"
            raise RequestError(Code.OVERLOADED, words)
        self.held += size
        media.held += size

    async def _one(self, kind: str, item: Any, media: Media) -> bytes:
        url = item.get("Url") if isinstance(item, dict) else item
        if not isinstance(url, str):
            raise RequestError(Code.INVALID, f"{kind}: expected a URL, got {_short(item)}")
        data = await self._read(kind, url)
        self._hold(media, len(data))
        if kind == "image":
            await asyncio.to_thread(look, data, self._limits.max_pixels)
        return data

    async def _read(self, kind: str, url: str) -> bytes:
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return await asyncio.to_thread(_inline, url)
        from dynamo.common.http import HttpError, HttpStatusError, HttpTimeoutError
        from dynamo.common.http.media_reference import max_media_bytes
        from dynamo.common.http.url_validator import (
            UrlValidationError,
            UrlValidationPolicy,
            describe_error_detail,
            validate_media_reference,
        )

        policy, most = UrlValidationPolicy.from_env(), max_media_bytes()
        try:
            async with asyncio.timeout(self._limits.timeout):
                where = await validate_media_reference(url, policy)
                if scheme not in ("http", "https"):
                    return await asyncio.to_thread(_file, Path(where), most)
                if self._client is None:
                    self._client = _client(self._limits.domains)
                data: bytes = await self._client.fetch_bytes(where, self._limits.timeout, policy=policy, max_bytes=most)
                return data
        except UrlValidationError as error:
            why = str(error)
        except (TimeoutError, HttpTimeoutError):
            why = f"no answer within {self._limits.timeout:g} s"
        except HttpStatusError as error:
            why = f"its server answers {error.status}"
        except (HttpError, OSError, ValueError) as error:  # ValueError: no URL at all
            why = describe_error_detail(str(error) or type(error).__name__)
        raise RequestError(Code.INVALID, f"{kind}: {_label(url)}: {why}")


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


def look(data: bytes, max_pixels: int) -> None:
    """An image's header: is it one, and how large would it become? Raises RequestError(INVALID)."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its size: ours is the bound
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
    except UnidentifiedImageError:
        raise RequestError(Code.INVALID, f"image: not one of {', '.join(FORMATS)}, or damaged") from None
    except Image.DecompressionBombError:
        raise RequestError(Code.INVALID, f"image: more than {max_pixels} pixels") from None
    except Exception as error:  # a decoder's own ways to fail are many: struct.error, SyntaxError, OSError
        raise RequestError(Code.INVALID, f"image: damaged ({type(error).__name__})") from None
    if width * height > max_pixels:
        raise RequestError(Code.INVALID, f"image: {width} x {height} pixels, {max_pixels} in all at most")


def _items(data: Any) -> list[tuple[str, Any]]:
    """Kinds and references in the order in which the engine is to take them: by kind, and of each kind as in the messages."""
    if not isinstance(data, dict):
        raise RequestError(Code.INVALID, "multi_modal_data: expected an object")
    found = []
    for name, kind in KINDS.items():
        given = data.get(name) or []
        if not isinstance(given, list):
            raise RequestError(Code.INVALID, f"multi_modal_data.{name}: expected a list")
        found += [(kind, item) for item in given]
    if unknown := sorted(name for name, given in data.items() if given and name not in KINDS):
        raise RequestError(Code.INVALID, f"multi_modal_data: no such kind: {_short(unknown[0])}")
    return found


def _inline(url: str) -> bytes:
    """A data: URL's content. Raises RequestError(INVALID)."""
    from dynamo.common.http.url_validator import max_data_url_bytes

    most = max_data_url_bytes()
    if len(url) > most:
        raise RequestError(Code.INVALID, f"a data: URL of {len(url)} bytes, {most} at most (DYN_MM_MAX_DATA_URL_MB)")
    head, comma, body = url.partition(",")
    if not comma:
        raise RequestError(Code.INVALID, "a data: URL without a comma")
    try:
        if head.rpartition(";")[2].strip().lower() == "base64":
            return base64.b64decode(urllib.parse.unquote_to_bytes(body) if "%" in body else body, validate=True)
        return urllib.parse.unquote_to_bytes(body)
    except (binascii.Error, ValueError) as error:
        raise RequestError(Code.INVALID, f"a data: URL that is no base64: {error}") from None


def _file(path: Path, most: int) -> bytes:
    """A file inside DYN_MM_LOCAL_PATH. Raises OSError, ValueError for what is too large or no file."""
    if not path.is_file():  # a pipe or a device would never end
        raise ValueError("not a file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"more than {most} bytes (DYN_MM_MAX_FILE_SIZE_MB)")
    return data


def _label(url: str) -> str:
    from dynamo.common.http.url_validator import describe_media_source

    return str(describe_media_source(url))


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, dict) else f"an object with {', '.join(sorted(map(str, value))[:5])}"
    return text if len(text) <= 80 else f"{text[:80]}..."
