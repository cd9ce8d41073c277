"""An image that Dynamo's frontend has decoded: where its pixels are, read from a request and judged before it is believed."""

import math
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from shared.errors import Code, RequestError

NAME = "Decoded"
"""An item's key in Dynamo's ``multi_modal_data``, where others have ``Url`` (1.6.1)."""
METADATA_LIMIT = 1 << 20
"""Characters of a frontend's NIXL metadata: 500, and some 150 for each image that it holds."""
Size = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]


class Place(msgspec.Struct):
    """Memory of the frontend's process."""

    addr: Size
    size: Size
    mem_type: Literal["Dram", "DRAM", "dram"] = "Dram"


class Decoded(msgspec.Struct):
    """One image. ``shape``: height, width, and one to four channels of a byte each: grey, grey and alpha, RGB, RGBA."""

    nixl_metadata: Annotated[str, Meta(min_length=1, max_length=METADATA_LIMIT)]
    nixl_descriptor: Place
    shape: Annotated[list[Size], Meta(min_length=3, max_length=3)]
    dtype: Literal["UINT8", "uint8"] = "UINT8"
    content_hash: str | None = None


def named(item: Any) -> bool:
    return isinstance(item, dict) and NAME in item


def check(item: Any, kind: str, max_pixels: int) -> Decoded:
    """Raises RequestError(INVALID) for what is no image, or larger than ``max_pixels``, or says two sizes."""
    if kind != "image":
        raise RequestError(Code.INVALID, f"{kind} is not taken as a frontend decodes it")
    try:
        found = msgspec.convert(item[NAME], Decoded)
    except (msgspec.ValidationError, ValueError, RecursionError) as error:  # ValueError: half a surrogate
        raise RequestError(Code.INVALID, f"decoded: {error}") from None
    height, width, channels = found.shape
    if channels > 4:
        raise RequestError(Code.INVALID, f"decoded: {channels} channels")
    if height * width > max_pixels:
        raise RequestError(Code.INVALID, f"{width} x {height} pixels, {max_pixels} in all at most")
    if math.prod(found.shape) != found.nixl_descriptor.size:
        raise RequestError(Code.INVALID, f"decoded: {found.nixl_descriptor.size} bytes for {width} x {height} x {channels}")
    return found


def pack(found: Decoded) -> bytes:
    """As it goes to the engine in the file's place."""
    return msgspec.json.encode(found)


def unpack(data: Any) -> Decoded:
    return msgspec.json.decode(data, type=Decoded)
