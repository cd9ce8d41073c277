"""What an image file says of itself, read before anything decodes it: is it one, and how large would it become?

Its pixels are not decoded here. That costs as much again as in the engine (PNG noise of 16 MB: 50 to 65 ms, a flat one of
64 megapixels: 0.5 s and 256 MB), and SGLang 0.5.23 decodes in a thread of its own, where a damaged one ends as a ValueError.
"""

import io
import re
import struct
from typing import Any

from shared.errors import Code, RequestError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
"""Those that are decoded at all."""
SCANS = 100
"""Of a progressive JPEG; common ones have ten. Each goes over the whole image, which takes 22 ms at 64 megapixels and some
bytes in the file."""
HEADER_BYTES = 1 << 20
"""Of a PNG, JPEG or GIF until its pixels begin, and of all in a PNG that is no pixels. PIL goes over it in Python; with
colour profiles and comments common ones have some 100 kB."""
HEADER_READS = 10_000
"""Each costs PIL a microsecond or more: three a chunk of a PNG, three a segment of a JPEG, two a block of a GIF."""
CHUNKS = 10_000
"""Of a PNG, which PIL goes over in Python while it decodes; common ones have 8 kB of pixels in each and more."""
PROFILES = 10
"""Of a PNG, which may have one (PNG 1.2, 4.2.2.4). PIL unpacks each, up to 1 MB from 1 kB."""
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
PNG = b"\x89PNG\r\n\x1a\n"
PIXELS = (b"IDAT", b"fdAT")
SCAN, END = b"\xff\xda", b"\xff\xd9"


class _Header(io.BytesIO):
    """The file as PIL may read it to open it. Raises RequestError(INVALID) when its pixels don't begin soon."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        found = super().read(size)
        if self.tell() > HEADER_BYTES or self.reads > HEADER_READS:
            raise _long_header()
        return found


def look(data: bytes, max_pixels: int) -> int:
    """An image's pixels. Raises RequestError(INVALID) for what is no image, for damage in its header, for more pixels."""
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # ours is the bound, and nothing is decoded here
    if data.startswith(PNG):
        _check_chunks(data)
    # PIL gives a WEBP as a whole to its library, which goes over it in C.
    file = io.BytesIO(data) if data.startswith(b"RIFF") else _Header(data)
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            progressive = _is_progressive(image)
    except RequestError:
        raise
    except UnidentifiedImageError:
        raise RequestError(Code.INVALID, f"not one of {', '.join(FORMATS)}, or damaged") from None
    except Exception as error:  # a decoder's own ways to fail are many: struct.error, SyntaxError, OSError
        raise RequestError(Code.INVALID, f"damaged ({type(error).__name__})") from None
    if width * height > max_pixels:
        raise RequestError(Code.INVALID, f"{width} x {height} pixels, {max_pixels} in all at most (--media-max-megapixels)")
    if progressive and data.count(SCAN) > SCANS and (found := scans(data)) > SCANS:
        raise RequestError(Code.INVALID, f"a progressive JPEG of {found} scans, {SCANS} at most")
    return width * height


def _check_chunks(data: bytes) -> None:
    """Those behind a PNG's pixels are read by who decodes it. Raises RequestError(INVALID) for too many, or too large ones."""
    place, other, profiles = len(PNG), 0, 0
    for _ in range(CHUNKS):
        if place + 8 > len(data):
            return
        size, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"IEND":
            return
        other += 0 if kind in PIXELS else min(size, len(data) - place)
        if other > HEADER_BYTES:
            raise _long_header()
        profiles += kind == b"iCCP"
        if profiles > PROFILES:
            raise RequestError(Code.INVALID, f"a PNG of more than {PROFILES} colour profiles")
        place += 12 + size
    raise RequestError(Code.INVALID, f"a PNG of more than {CHUNKS} chunks")


def _long_header() -> RequestError:
    return RequestError(Code.INVALID, f"a header of more than {HEADER_BYTES >> 20} MB, or of more than {HEADER_READS} pieces")


def _is_progressive(image: Any) -> bool:
    # MPO: one that says it has others behind it.
    return bool(image.format in ("JPEG", "MPO") and image.info.get("progressive"))


def scans(data: bytes) -> int:
    """Scans of a JPEG, not counting what its metadata or something behind its end has in common with one."""
    found, place = 0, 2
    while (marker := MARKER.search(data, place)) is not None and marker.group() != END:
        found += marker.group() == SCAN
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return found
