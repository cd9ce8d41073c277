"""Frames as files: PNG for a picture, mp4 (VP9, royalty-free) for a video, encoded as dynamo.sglang 1.6.1 does."""

import io
from collections.abc import Callable, Sequence
from typing import Any


def png(frame: Any) -> bytes:
    """A uint8 array [height, width, 3], or what Pillow has made of it."""
    from PIL import Image

    picture = frame if isinstance(frame, Image.Image) else Image.fromarray(frame)
    out = io.BytesIO()
    picture.save(out, format="PNG")
    return out.getvalue()


def mp4(frames: Sequence[Any], fps: int, on_frame: Callable[[], None]) -> bytes:
    """All frames of one size. ``on_frame`` is called for each that the encoder has taken."""
    import imageio
    import numpy

    out = io.BytesIO()
    options: dict[str, Any] = {"codec": "libvpx-vp9", "output_params": ["-pix_fmt", "yuv420p"]}
    with imageio.get_writer(out, format="mp4", fps=fps, **options) as writer:
        for frame in frames:
            writer.append_data(numpy.asarray(frame))
            on_frame()
    return out.getvalue()
