"""What an image file says of itself, read before anything decodes it: is it one, and how large would it become?

Its pixels are not decoded here. That costs as much again as in the engine (PNG noise of 16 MB: 50 to 65 ms, a flat one of
64 megapixels: 0.5 s and 256 MB), and SGLang 0.5.23 decodes in a thread of its own, where a damaged one ends as a ValueError.
"""

import io
import re
import warnings
from typing import Any

from shared.errors import Code, RequestError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
"""Those that are decoded at all."""
SCANS = 100
"""Of a progressive JPEG; common ones have ten. Each goes over the whole image, which takes 22 ms at 64 megapixels and some
bytes in the file."""
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
SCAN, END = b"\xff\xda", b"\xff\xd9"


def look(data: bytes, max_pixels: int) -> int:
    """An image's pixels. Raises RequestError(INVALID) for what is no image, for damage in its header, for more pixels."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its size: ours is the bound
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                progressive = _is_progressive(image)
    except UnidentifiedImageError:
        raise RequestError(Code.INVALID, f"not one of {', '.join(FORMATS)}, or damaged") from None
    except Image.DecompressionBombError:
        raise RequestError(Code.INVALID, f"more than {max_pixels} pixels") from None
    except Exception as error:  # a decoder's own ways to fail are many: struct.error, SyntaxError, OSError
        raise RequestError(Code.INVALID, f"damaged ({type(error).__name__})") from None
    if width * height > max_pixels:
        raise RequestError(Code.INVALID, f"{width} x {height} pixels, {max_pixels} in all at most (--media-max-megapixels)")
    if progressive and data.count(SCAN) > SCANS and (found := scans(data)) > SCANS:
        raise RequestError(Code.INVALID, f"a progressive JPEG of {found} scans, {SCANS} at most")
    return width * height


def _is_progressive(image: Any) -> bool:
    return bool(image.format == "JPEG" and image.info.get("progressive"))


def scans(data: bytes) -> int:
    """Scans of a JPEG, not counting what its metadata or something behind its end has in common with one."""
    found, place = 0, 2
    while (marker := MARKER.search(data, place)) is not None and marker.group() != END:
        found += marker.group() == SCAN
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return found
