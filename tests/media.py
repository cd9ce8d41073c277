"""Pictures, what hostile clients send in their place, and an origin that serves both. The same bytes in every run."""

import base64
import http.server
import io
import random
import struct
import threading
import zlib
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

SIZE = (112, 84)
"""Pixels of a picture: twelve tokens of the demo model's."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


@cache
def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Four by four fields of colour."""
    fields = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    width, height = size
    return Image.fromarray(np.kron(fields, np.ones((height // 4, width // 4, 1), dtype=np.uint8)))


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def good(seed: int, form: str = "PNG") -> bytes:
    return saved(picture(seed), form)


@cache
def noise(size: int, seed: int = 0) -> bytes:
    """A PNG of about so many bytes."""
    side = int((size / 3) ** 0.5)
    return saved(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)))


def url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def part(reference: Any) -> dict[str, Any]:
    """Of a chat message."""
    return {"type": "image_url", "image_url": {"url": reference}}


# --- damaged and lying images --------------------------------------------------------------------------------------------


def cut(content: bytes, share: float) -> bytes:
    return content[: int(len(content) * share)]


def flipped(content: bytes, seed: int, bits: int = 12) -> bytes:
    """Some bits of it are others."""
    chance, damaged = random.Random(seed), bytearray(content)
    for _ in range(bits):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG, with a right checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and has nothing else."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


@cache
def png_bomb(side: int) -> bytes:
    """Three bytes a pixel when it is decoded, a thousandth of that here."""
    squeeze, row = zlib.compressobj(9), bytes(1 + 3 * side)
    rows = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()
    return png_header(side, side) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@cache
def scan_bomb(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again: each goes over every pixel, for some bytes."""
    whole = saved(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * scans + whole[-2:]


TEXT_BOMB = png_header(8, 8) + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(256 << 20), 9)) + chunk(b"IEND", b"")
"""A comment of 256 MB."""


# --- an origin -----------------------------------------------------------------------------------------------------------


class Origin:
    """An HTTP server on 127.0.0.1. ``/good`` is a picture, ``/never`` says nothing; ``answers`` adds pages."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        """Paths, in the order in which they were asked for."""
        self.left: list[str] = []
        """Paths whose client hung up on them."""
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {"/good": (200, {}, good(1))}
        """Status, headers and body; a Content-Length that isn't given is right."""
        origin = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                origin.asked.append(self.path)
                self.close_connection = True
                if self.path == "/never":
                    self.connection.recv(1)
                    origin.left.append(self.path)
                elif self.path == "/drip":
                    self._drip()
                elif self.path in origin.answers:
                    self._answer(*origin.answers[self.path])
                else:
                    self._answer(404, {}, b"")

            def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def _drip(self) -> None:
                """A body without an end."""
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                piece = bytes(1 << 16)
                try:
                    while True:
                        self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                except OSError:
                    origin.left.append(self.path)

            def log_message(self, *_: Any) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def redirect(self, path: str, to: str) -> str:
        """A page that sends its visitor elsewhere; its URL."""
        self.answers[path] = (302, {"Location": to}, b"")
        return self.url + path

    def __enter__(self) -> "Origin":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
