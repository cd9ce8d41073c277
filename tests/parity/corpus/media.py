"""Images, and what is none, sent to a vision model: how many, which formats and sizes, which options; damaged; refused."""

from pathlib import Path
from typing import Any

from PIL import Image

from tests.media import saved, url
from tests.parity.case import Case
from tests.parity.corpus import pictures
from tests.parity.corpus.build import both, chat, completion, message, response, streamed
from tests.parity.corpus.generate import native, params
from tests.parity.corpus.guided import SCHEMA
from tests.parity.corpus.pictures import A, B, C, picture, turned
from tests.parity.corpus.tools import TOOLS

START, END, PAD = 5, 6, 7
"""The vision model's ids around an image, and in its place."""
SIZES = ((1, 1), (2, 199), (1, 200), (1, 201), (28, 28), (27, 29), (1000, 700), (2500, 40))
DRAWN: dict[str, Any] = {"temperature": 1.0, "ignore_eos": True, "compare": "shape"}
ASK = "What is this?"
HERE = Path(__file__).resolve().parents[3] / "docs" / "grafana.png"
"""An image file on the worker's disk."""
HANGS = "dynamo.sglang never answers: more placeholders than images end its processor with StopIteration"


def image(given: bytes | str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url(given) if isinstance(given, bytes) else given, **more}}


def text(words: str = ASK) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def see(name: str, *images: bytes | str, words: str = ASK, **options: Any) -> Case:
    """A chat about these images."""
    return chat(f"media/{name}", [user(*map(image, images), text(words))], **options)


def says(name: str, *messages: dict[str, Any], **options: Any) -> Case:
    return chat(f"media/{name}", list(messages), **options)


def _bomb() -> bytes:
    """100 megapixels, 12 kB."""
    return saved(Image.new("1", (10_000, 10_000)))


def _flat(width: int, height: int) -> bytes:
    return saved(Image.new("RGB", (width, height), (200, 30, 90)))


CASES: list[Case] = [
    # Each picture is asked about for the first time here: what is cached later is compared as well.
    *both(
        see("one", A),
        see("another", B),
        see("two", A, B),
        see("two in the other order", B, A),
        see("the same twice", A, A),
        see("three sizes", A, B, C),
        see("eight", *[A, B] * 4),
        see("none"),
        says("without words", user(image(A))),
        says("words first", user(text(), image(A))),
        says("words between", user(text("This"), image(A), text("or that"), image(B), text("?"))),
        says("system", {"role": "system", "content": "Be brief."}, user(image(A), text())),
        says(
            "several turns",
            user(image(A), text()),
            {"role": "assistant", "content": "A ramp."},
            user(text("And this?"), image(B)),
        ),
        says("unicode", user(image(A), text("何ですか 🙂")), max_tokens=24),
        see("detail", A, words="Look closely."),
        see("logprobs", A, logprobs=True, top_logprobs=3),
        see("prompt_logprobs", A, prompt_logprobs=1),
        see("n 2", A, n=2, temperature=1.0, top_k=1),
        see("n 3 drawn", B, n=3, **DRAWN),
        see("seed", A, seed=7, **DRAWN),
        see("stop", A, stop=["o", "e", "a"], max_tokens=40),
        see("stop_token_ids", A, stop_token_ids=list(range(60, 92)), max_tokens=40),
        see("ignore_eos", C, ignore_eos=True, max_tokens=60),
        see("min_tokens", A, min_tokens=4),
        see("penalties", A, frequency_penalty=1.0, presence_penalty=0.5),
        see("format", A, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, max_tokens=40),
        see("regex", A, guided_regex="[ab]{3}"),
        see("extra_fields", A, nvext={"extra_fields": ["stop_reason", "engine_data", "token_ids", "timing"]}),
        see("tools", A, tools=TOOLS),
        see("jpeg", url(saved(picture(), "JPEG", quality=90), "image/jpeg")),
        see("webp", url(saved(picture(), "WEBP", lossless=True), "image/webp")),
        see("gif", url(saved(picture(), "GIF"), "image/gif")),
        see("damaged base64", "data:image/png;base64,@@@@"),
        see("cut png", A[: len(A) // 2]),
        see("empty", b""),
        see("no image", b"not an image"),
        see("one of two damaged", A, B[: len(B) // 2]),
    ),
    see("again", A),
    says("in a system message", {"role": "system", "content": [image(A), text("Be brief.")]}, user(text())),
    says("in an assistant's", user(text()), {"role": "assistant", "content": [image(A)]}, user(text("And?"))),
    says("detail high", user(image(A, detail="high"), text())),
    says("processor options", user(image(A), text()), mm_processor_kwargs={"max_pixels": 3136}),
    says("loader options", user(image(A), text()), media_io_kwargs={"image": {"mode": "L"}}),
    see("max_tokens 1", A, max_tokens=1),
    see("max_tokens 0", A, max_tokens=0),
    see("cache_salt", A, nvext={"cache_salt": "a"}),
    see("priority", A, nvext={"agent_hints": {"priority": 3}}),
    see("token_data", A, nvext={"token_data": [20, START, PAD, END, 30]}),
    see("unknown model", A, model="nobody"),
    # Formats and sizes.
    see("gif animated", url(saved(picture(), "GIF", save_all=True, append_images=[picture(2)]), "image/gif")),
    see("jpeg progressive", url(saved(picture(), "JPEG", progressive=True), "image/jpeg")),
    see("jpeg grey", url(saved(picture(mode="L"), "JPEG"), "image/jpeg")),
    see("jpeg CMYK", url(saved(picture(mode="CMYK"), "JPEG"), "image/jpeg")),
    *[see(f"jpeg turned {way}", url(turned(way), "image/jpeg")) for way in (3, 6, 8)],
    see("webp lossy", url(saved(picture(), "WEBP", quality=50), "image/webp")),
    see("webp alpha", url(saved(pictures.translucent(), "WEBP", lossless=True), "image/webp")),
    see("bmp", url(saved(picture(), "BMP"), "image/bmp")),
    see("tiff", url(saved(picture(), "TIFF"), "image/tiff")),
    see("svg", url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml")),
    see("png alpha", saved(pictures.translucent())),
    see("png palette", saved(picture().quantize(16))),
    see("png palette with a hole", pictures.palette_with_hole()),
    see("png grey", saved(picture(mode="L"))),
    see("png grey alpha", saved(picture(mode="LA"))),
    see("png bits", saved(picture(mode="1"))),
    see("png 16 bit", saved(picture(mode="I;16"))),
    *[see(f"size {width}x{height}", _flat(width, height)) for width, height in SIZES],
    see("of another kind than it says", url(A, "image/jpeg")),
    see("kind absent", url(A, "")),
    see("kind text", url(A, "text/plain")),
    # What can't be read, or is no image.
    see("base64 with white space", url(A).replace(",", ",\n ")),
    see("base64 with lines", "\n".join(url(A)[at : at + 76] for at in range(0, len(url(A)), 76))),
    see("base64 without its end", url(A).rstrip("=")[:-1]),
    see("base64 of URLs", url(A).replace("+", "-").replace("/", "_").replace("image_", "image/")),
    see("base64 escaped", url(A).replace("+", "%2B").replace("=", "%3D")),
    see("data escaped", "data:image/png," + "".join(f"%{byte:02x}" for byte in saved(picture(1, (8, 8))))),
    see("data without comma", "data:image/png;base64"),
    see("scheme in capitals", url(A).replace("data:", "DATA:")),
    see("cut jpeg", url(saved(picture(), "JPEG")[:1500], "image/jpeg")),
    see("cut header", A[:20]),
    see("bad sum", A[:60] + bytes([A[60] ^ 255]) + A[61:]),
    see("bomb", _bomb()),
    see("too many", *[_flat(28, 28)] * 9),
    see("too long", *[_flat(448 + seed, 448) for seed in range(20)]),
    see("url empty", ""),
    see("url none", "nothing"),
    see("url ftp", "ftp://example.com/a.png"),
    see("url of this machine", "http://127.0.0.1:9/none.png"),
    see("url of a name of this machine", "http://localhost/none.png"),
    see("url of metadata", "http://169.254.169.254/latest"),
    see("path", str(HERE)),
    see("file", HERE.as_uri()),
    see("file without host", f"file:{HERE}"),
    see("file absent", "file:///none.png"),
    see("file no image", "file:///etc/passwd"),
    says("url absent", user({"type": "image_url", "image_url": {}}, text())),
    says("url a number", user({"type": "image_url", "image_url": {"url": 3}}, text())),
    says("url a text", user({"type": "image_url", "image_url": url(A)}, text())),
    # A placeholder that a client writes is one to the frontend's tokenizer.
    see("placeholder written", A, words="<|image_pad|>", alone=HANGS, wanted=400),
    streamed(see("placeholder written", A, words="<|image_pad|>", alone=HANGS, wanted=400)),
    see("placeholder written, no image", words="<|image_pad|>"),
    see("marks written", A, words="<|vision_start|><|vision_end|>"),
    # Kinds that this model or this host doesn't take.
    says("video", user({"type": "video_url", "video_url": {"url": url(b"none", "video/mp4")}}, text())),
    says("video file", user({"type": "video_url", "video_url": {"url": "file:///none.mp4"}}, text())),
    says("image and video", user(image(A), {"type": "video_url", "video_url": {"url": url(b"none", "video/mp4")}}, text())),
    says("audio", user({"type": "audio_url", "audio_url": {"url": url(b"none", "audio/wav")}}, text())),
    says("input_audio", user({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, text())),
    says("unknown kind", user({"type": "smell", "smell": {"url": url(A)}}, text())),
    # Other ways in.
    *both(
        response("media/image", [{"role": "user", "content": [{"type": "input_image", "image_url": url(A)}]}]),
        message(
            "media/image",
            [
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": url(A).partition(",")[2]}},
                text(),
            ],
        ),
    ),
    message("media/damaged", [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}]),
    completion("media/text only"),
    completion("media/marks as ids", [20, START, PAD, END, 30]),
    completion("media/marks as text", "<|vision_start|><|image_pad|><|vision_end|>What"),
    native("media/text only"),
    native("media/image", [20, START, PAD, END, 30], image_data=url(A)),
    native("media/images", [20, START, PAD, END, 30], image_data=[url(A)]),
    native("media/whole", [20, START, PAD, END, 30], image_data=url(A), stream=False),
    native("media/file", [20, START, PAD, END, 30], image_data=str(HERE)),
    native("media/damaged", [20, START, PAD, END, 30], image_data="data:image/png;base64,@@@@"),
    native("media/placeholder alone", [20, START, PAD, END, 30]),
    native("media/logprobs", [20, START, PAD, END, 30], image_data=url(A), return_logprob=True, top_logprobs_num=2),
    native("media/n 2", [20, START, PAD, END, 30], image_data=url(A), sampling_params=params(n=2)),
    native("media/video", video_data=url(b"none", "video/mp4")),
    native("media/audio", audio_data=url(b"none", "audio/wav")),
    # Answered by sgnode only, and so cached there only: last.
    says("uuid", user({**image(A), "uuid": "mine"}, text())),
]
