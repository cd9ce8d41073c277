"""Pictures, what hostile clients send in their place, and an origin that serves both. The same bytes in every run."""

import base64
import http.server
import io
import os
import random
import struct
import threading
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
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


@cache
def text_bomb() -> bytes:
    """A PNG with a comment of 256 MB."""
    squeeze, piece = zlib.compressobj(9), bytes(1 << 20)
    comment = b"".join(squeeze.compress(piece) for _ in range(256)) + squeeze.flush()
    return png_header(8, 8) + chunk(b"zTXt", b"a\0\0" + comment) + chunk(b"IEND", b"")


@cache
def long_header(form: str, size: int) -> bytes:
    """A small file of about so many bytes, almost all of them empty pieces of a header; ``PNG behind``: behind its pixels."""
    if form == "JPEG":
        whole = saved(Image.new("L", (64, 64), 128), "JPEG")
        return whole[:2] + b"\xff\xfe\0\2" * (size // 4) + whole[2:]
    if form == "JPEG padded":
        whole = saved(Image.new("L", (64, 64), 128), "JPEG")
        return whole[:2] + b"\xff" * size + whole[2:]
    if form == "JPEG tables":
        whole = saved(Image.new("L", (64, 64), 128), "JPEG")
        tables = (b"\0" + b"\1" * 64) * 1000
        return whole[:2] + (b"\xff\xdb" + struct.pack(">H", 2 + len(tables)) + tables) * (size // len(tables)) + whole[2:]
    if form == "GIF":
        whole = saved(Image.new("L", (64, 64), 128), "GIF")
        place = whole.index(b",", 13 + 3 * 2 ** ((whole[10] & 7) + 1))  # behind the palette
        return whole[:place] + b"!\xfe" + b"\1a" * (size // 2) + b"\0" + whole[place:]
    whole = saved(Image.new("L", (64, 64), 128))
    place = whole.index(b"IDAT" if form == "PNG" else b"IEND") - 4
    return whole[:place] + chunk(b"prVt", b"") * (size // 12) + whole[place:]


LONG = ("JPEG", "JPEG padded", "JPEG tables", "GIF", "PNG", "PNG behind")


@cache
def profile_bomb(profiles: int) -> bytes:
    """A PNG whose colour profiles have 1 MB each, of 1 kB here."""
    whole, profile = saved(Image.new("L", (64, 64), 128)), b"a\0\0" + zlib.compress(bytes(1 << 20), 9)
    place = whole.index(b"IDAT") - 4
    return whole[:place] + chunk(b"iCCP", profile) * profiles + whole[place:]


# --- an origin -----------------------------------------------------------------------------------------------------------


class Origin:
    """An HTTP server on 127.0.0.1. ``/good`` is a picture; ``answers`` adds pages.

    ``/never`` says nothing, except to Dynamo's frontend, which asks for an image's first bytes and waits 10 s for them.
    """

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
                self.close_connection = True
                if "Range" in self.headers:
                    self._answer(200, {}, good(1))
                    return
                origin.asked.append(self.path)
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


# --- the corpus ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hostile:
    """References in one request. ``passes``: an agent may let them through, to be judged where they are decoded."""

    name: str
    references: tuple[Any, ...]
    passes: bool = False


def damaged() -> list[Hostile]:
    """Files that begin like an image."""
    found = []
    for form in FORMATS:
        whole = good(1, form)
        found += [Hostile(f"{form} cut at {share}", (url(cut(whole, share)),), True) for share in (0.02, 0.2, 0.5, 0.8, 0.95)]
        found += [Hostile(f"{form} flipped {seed}", (url(flipped(whole, seed)),), True) for seed in range(5)]
    found.append(Hostile("a good one and a cut one", (url(good(1)), url(cut(good(2), 0.5))), True))
    return found


def no_images() -> list[Hostile]:
    """Files that are none, or none that is taken."""
    files = {
        "empty": b"",
        "one byte": b"\x89",
        "text": b"not an image" * 100,
        "zeros": bytes(10_000),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "html": b"<!doctype html><script>alert(1)</script>",
        "bmp": saved(picture(1), "BMP"),
        "tiff": saved(picture(1), "TIFF"),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
        "a header of 100,000 x 100,000": png_header(100_000, 100_000),
        "a header of 2**31 - 1": png_header(2**31 - 1, 2**31 - 1),
        "a header of no pixels": png_header(0, 0),
        "a bomb of 10,000 x 10,000": png_bomb(10_000),
        "a comment of 256 MB": text_bomb(),
        "a JPEG of 500 scans": scan_bomb(64, 500),
        "a PNG of 900 colour profiles": profile_bomb(900),
        **{f"{form}: a header of 14 MB": long_header(form, 14 << 20) for form in LONG},
    }
    return [Hostile(name, (url(content),)) for name, content in files.items()]


def data_urls(bound: int) -> list[Hostile]:
    """``bound``: DYN_MM_MAX_DATA_URL_MB in bytes."""
    whole = url(good(1))
    urls = {
        "no comma": "data:image/png;base64",
        "nothing": "data:",
        "nothing behind the comma": "data:image/png;base64,",
        "not said to be base64": whole.replace(";base64", ""),
        "other characters": "data:image/png;base64,@@@@",
        "one character too few": whole.rstrip("=")[:-1],
        "spaces": whole[:40] + "    " + whole[40:],
        "percent signs": "data:image/png;base64," + "%41" * 10_000,
        "NUL": "data:image/png;base64,\0\0\0\0",
        "not ASCII": "data:image/png;base64,日本語日本語",
        "over the bound": "data:image/png;base64," + "A" * bound,
        "a type over the bound": "data:" + "A" * bound + ";base64,AAAA",
    }
    return [Hostile(f"data: {name}", (found,)) for name, found in urls.items()]


def files(allowed: Path) -> list[Hostile]:
    """``allowed``: DYN_MM_LOCAL_PATH, in a directory that is the test's own."""
    outside = allowed.parent / "outside.png"
    outside.write_bytes(good(1))
    (allowed / "link.png").symlink_to(outside)
    (allowed / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(allowed / "pipe.png")
    (allowed / "text.png").write_text("not an image")
    with (allowed / "large.png").open("wb") as large:
        large.truncate(1 << 30)
    urls = (
        "file:///etc/passwd", "file:///dev/zero", "file:///proc/self/environ", "/etc/passwd", "etc/passwd",
        outside.as_uri(), f"{allowed.as_uri()}/../outside.png", f"{allowed.as_uri()}/%2e%2e/outside.png",
        *((allowed / name).as_uri() for name in ("link.png", "zero.png", "pipe.png", "text.png", "large.png", "none.png")),
        allowed.as_uri(), f"{allowed.as_uri()}/%00.png", f"{allowed.as_uri()}/{'a' * 5000}", "file://", "file:",
        f"file://elsewhere{outside}",
    )  # fmt: skip
    return [Hostile(short(found), (found,)) for found in urls]


def urls() -> list[Hostile]:
    """What is hardly a URL."""
    found = (
        "", " ", "image.png", "http://", "https://", "http:///good", "http://[::1", "http://[::1]:99999/", "http://a b/", "::::",
        "ftp://127.0.0.1/a.png", "gopher://127.0.0.1/", "javascript:alert(1)", "ldap://127.0.0.1", "s3://bucket/a.png",
        "https://1.1.1.1\\@127.0.0.1/", "\0", "http://127.0.0.1:1/\r\nHost: x", "http://" + "a" * 100_000,
        "http://" + "a." * 200 + "invalid", "\ud800",
    )  # fmt: skip
    return [Hostile(short(each), (each,)) for each in found]


def things() -> list[Hostile]:
    """No references at all."""
    deep: Any = "x"
    for _ in range(500):
        deep = {"Url": deep}
    decoded = {
        "shape": [2**31, 2**31, 3],
        "dtype": "UINT8",
        "nixl_metadata": "b64:AAAA",
        "nixl_descriptor": {"addr": 1, "size": 8},
    }
    found: dict[str, Any] = {
        "null": None,
        "a number": 5,
        "true": True,
        "bytes": b"x",
        "a list": [url(good(1))],
        "an empty object": {},
        "a URL that is a number": {"Url": 5},
        "a URL that is an object": {"Url": {"Url": url(good(1))}},
        "objects in objects": deep,
        "an object of 10,000 names": {str(number): number for number in range(10_000)},
        "decoded by a frontend": {"Decoded": decoded},
        "an id": {"UuidOnly": "u1"},
    }
    return [Hostile(name, (thing,)) for name, thing in found.items()]


def fetched(origin: Origin, allowed: Path) -> list[Hostile]:
    """Answers of an origin that may be asked."""
    picture, squeezed = good(1), zlib.compressobj(9, wbits=31)
    bomb = b"".join(squeezed.compress(bytes(1 << 20)) for _ in range(256)) + squeezed.flush()
    pages: dict[str, tuple[int, dict[str, str], bytes]] = {
        "/page": (200, {"Content-Type": "text/html"}, b"<html>"),
        "/empty": (200, {}, b""),
        "/error": (500, {}, b"\x89PNG"),
        "/nowhere": (302, {}, b""),
        "/long": (200, {"Content-Length": "1000000"}, picture),
        "/short": (200, {"Content-Length": "100"}, picture),
        "/huge": (200, {"Content-Length": str(1 << 40)}, picture),
        "/squeezed": (200, {"Content-Encoding": "gzip"}, bomb),
        "/no gzip": (200, {"Content-Encoding": "gzip"}, picture),
    }
    origin.answers |= pages
    for number in range(5):
        origin.redirect(f"/hop{number}", f"/hop{number + 1}")
    found = [
        origin.redirect("/loop", "/loop"),
        origin.redirect("/to-file", "file:///etc/passwd"),
        origin.redirect("/to-allowed-file", f"{allowed.as_uri()}/text.png"),
        origin.redirect("/to-ftp", "ftp://127.0.0.1/a.png"),
        origin.redirect("/to-data", url(picture)),
        origin.redirect("/to-nothing", "http://"),
        *(origin.url + path for path in (*pages, "/hop0", "/drip", "/404")),
        "http://127.0.0.1:1/closed",
    ]
    # A body that is longer than it says: those bytes may be taken, as the picture that they begin.
    return [Hostile(f"fetched {each.removeprefix(origin.url)}", (each,), each.endswith("/short")) for each in found]


def internal() -> list[str]:
    """Addresses that are nobody's business, in all their spellings."""
    return [
        "https://127.0.0.1/", "https://127.1/", "https://2130706433/", "https://0x7f000001/", "https://0177.0.0.1/", "https://0/",
        "https://[::1]/", "https://[::]/", "https://[::ffff:127.0.0.1]/", "https://[::1%25lo]/", "https://[fe80::1]/",
        "https://localhost/", "https://LOCALHOST/", "https://localhost./", "https://127.0.0.1./", "https://①②⑦.0.0.1/",
        "https://169.254.169.254/latest/meta-data/", "https://metadata.google.internal/", "https://10.0.0.1/", "https://192.168.1.1/",
        "https://100.64.0.1/", "https://user:word@127.0.0.1/", "https://1.1.1.1@127.0.0.1/", "https://kubernetes.default.svc/",
        "http://1.1.1.1/a.png",
    ]  # fmt: skip


def short(text: str) -> str:
    """For a name of a case."""
    return ascii(text if len(text) < 60 else f"{text[:20]}...{text[-20:]}")
