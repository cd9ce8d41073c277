"""Pictures of the media set: small, made here, the same bytes each time."""

from PIL import Image

from tests import media

ORIENTATION = 0x0112
"""EXIF's tag of how a picture is to be turned."""


def picture(seed: int = 1, size: tuple[int, int] = media.SIZE, mode: str = "RGB") -> Image.Image:
    return media.picture(seed, size).convert(mode)


def turned(orientation: int) -> bytes:
    """A JPEG that says it lies on its side, or upside down."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return media.saved(picture(), "JPEG", exif=exif)


def translucent() -> Image.Image:
    made = picture(mode="RGBA")
    made.putalpha(Image.linear_gradient("L").resize(made.size))
    return made


def palette_with_hole() -> bytes:
    """A palette PNG, one of whose colours is transparent."""
    return media.saved(picture().quantize(16), transparency=0)


A, B = media.good(1), media.good(2)
C = media.saved(picture(3, (84, 140)))
