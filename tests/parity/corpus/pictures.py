"""Pictures of the media set: small, made here, the same bytes each time."""

import base64
import io
from typing import Any

from PIL import Image

ORIENTATION = 0x0112
"""EXIF's tag of how a picture is to be turned."""


def picture(width: int = 112, height: int = 84, seed: int = 1, mode: str = "RGB") -> Image.Image:
    """Stripes and ramps that differ by the seed."""
    made = Image.new("RGB", (width, height))
    made.putdata(
        [
            ((x * 5 * seed + y) % 256, (y * 3 + x * seed // 2) % 256, ((x // 16 + y // 16) * 40 * seed) % 256)
            for y in range(height)
            for x in range(width)
        ]
    )
    return made if mode == "RGB" else made.convert(mode)


def file(made: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    made.save(out, form, **options)
    return out.getvalue()


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def turned(orientation: int) -> bytes:
    """A JPEG that says it lies on its side, or upside down."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return file(picture(), "JPEG", exif=exif)


def translucent() -> Image.Image:
    made = picture(mode="RGBA")
    made.putalpha(Image.linear_gradient("L").resize(made.size))
    return made


def palette_with_hole() -> bytes:
    """A palette PNG, one of whose colours is transparent."""
    return file(picture(mode="RGB").quantize(16), transparency=0)


A, B = file(picture()), file(picture(seed=2))
C = file(picture(84, 140, seed=3))
