"""Images that a frontend has decoded: what of them is believed, what they count for, what the engine gets."""

import asyncio
import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from procs import launch
from procs.agent import decoding
from procs.agent.media import Intake
from shared import nixl as host
from shared.blobs import BLOBS
from shared.config import MediaLimits
from shared.errors import Code, RequestError
from shared.roles import decoded, media
from shared.roles.role import Asked, Media
from tests import media as pictures
from tests.unit.test_launch import node_config

LIMITS = MediaLimits(max_pixels=1000, memory_bytes=5000, frontend_decoding=True)
METADATA = "b64:eJw="


def item(*shape: int, **more: Any) -> dict[str, Any]:
    place = {"addr": 4096, "size": math.prod(shape), "mem_type": "Dram", "device_id": 0}
    found = {
        "nixl_metadata": METADATA,
        "nixl_descriptor": place,
        "shape": list(shape),
        "dtype": "UINT8",
        "metadata": {"Image": {}},
    }
    return {"Decoded": {**found, "content_hash": "00", **more}}


def gather(limits: MediaLimits, *images: Any, **kinds: Any) -> Media:
    async def main() -> Media:
        return await Intake(limits).gather({"image_url": list(images), **kinds})

    return asyncio.run(main())


WRONG = {
    "no object": {"Decoded": None},
    "nothing": {"Decoded": {}},
    "no memory": item(2, 2, 3, nixl_descriptor=None),
    "no address": item(2, 2, 3, nixl_descriptor={"addr": 0, "size": 12}),
    "an address past all": item(2, 2, 3, nixl_descriptor={"addr": 1 << 64, "size": 12}),
    "of a GPU": item(2, 2, 3, nixl_descriptor={"addr": 1, "size": 12, "mem_type": "Vram"}),
    "another size": item(2, 2, 3, nixl_descriptor={"addr": 1, "size": 13}),
    "two dimensions": item(4, 3),
    "a video": item(2, 2, 2, 3),
    "no pixel": item(0, 2, 3),
    "five channels": item(2, 2, 5),
    "too many pixels": item(1001, 1, 3),
    "far too many": item(1 << 31, 1 << 31, 3),
    "floats": item(2, 2, 3, dtype="FLOAT32"),
    "no metadata": item(2, 2, 3, nixl_metadata=""),
    "metadata without end": item(2, 2, 3, nixl_metadata="b64:" + "A" * (1 << 20)),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_names_its_image(name: str) -> None:
    with pytest.raises(RequestError, match=r"^image 2: ") as caught:
        gather(LIMITS, item(2, 2, 3), WRONG[name])
    assert caught.value.code == Code.INVALID


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(["nixl_metadata", "nixl_descriptor", "shape", "dtype", "content_hash"]), JSON)
def test_anything_in_a_field_is_taken_as_it_should_be_or_refused(name: str, value: Any) -> None:
    try:
        found = decoded.check(item(2, 2, 3, **{name: value}), "image", 1000)
    except RequestError as error:
        assert error.code == Code.INVALID
    else:
        assert math.prod(found.shape) == found.nixl_descriptor.size <= 4000


def test_they_go_along_with_files_and_count_by_what_they_will_take() -> None:
    asked = {"Url": pictures.url(pictures.saved(pictures.picture(1, (8, 8))))}
    found = gather(LIMITS, item(10, 10, 3), asked, item(10, 20, 4))
    assert found.kinds == ["image"] * 3 and found.decoded == [0, 2]
    assert found.blobs[1].startswith(b"\x89PNG") and found.held >= 300 + len(found.blobs[1]) + 800
    assert decoded.unpack(found.blobs[2]).shape == [10, 20, 4]
    payload = media.arguments(Asked({}, None, media=found))  # type: ignore[arg-type]
    assert payload == {"media": found.kinds, BLOBS: found.blobs, "decoded": [0, 2]}
    with pytest.raises(RequestError, match="--media-memory-mb"):
        gather(LIMITS, *[item(20, 20, 4)] * 4)
    with pytest.raises(RequestError, match="pixels together"):
        gather(MediaLimits(max_pixels=1000, frontend_decoding=True), *[item(30, 30, 3)] * 9)


def test_samples_of_a_request_count_each() -> None:
    held = Media(["image"], [b"{}"], held=1 << 24, decoded=[0])
    asked = Asked({"sampling_options": {"n": 17}}, _Facts(), media=held)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="17 samples with 16 MB"):
        media.check(asked)


class _Facts:
    media = ("image",)


def test_a_node_that_was_not_told_so_takes_none() -> None:
    with pytest.raises(RequestError, match="image 1: expected a URL, got an object with Decoded"):
        gather(MediaLimits(), item(2, 2, 3))
    with pytest.raises(RequestError, match="video 1: "):
        gather(LIMITS, video_url=[item(2, 2, 3)])


# --- the engine's end ----------------------------------------------------------------------------------------------------


def test_the_engine_gets_pictures_in_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    from procs.engine.adapter import nixl
    from procs.engine.adapter.decoded import Decoded

    rng = np.random.default_rng(1)
    there = {1000 * channels: rng.integers(0, 256, (4, 5, channels), dtype=np.uint8) for channels in (1, 2, 3, 4)}

    class Agent:
        async def read(self, metadata: dict[str, Any], shape: list[int], dtype: Any, seconds: float) -> Any:
            (place,) = metadata["descriptors"]
            if place["ptr"] not in there:
                raise RequestError(Code.PEER_DEAD, "gone")
            assert dtype is torch.uint8 and seconds == 30 and metadata["nixl_metadata"] == METADATA
            return torch.from_numpy(there[place["ptr"]].reshape(shape))

    monkeypatch.setattr(nixl, "agent", lambda bytes: Agent())
    reader = Decoded(MediaLimits(frontend_decoding=True))

    def packed(channels: int, address: int) -> bytes:
        found = item(4, 5, channels)
        found["Decoded"]["nixl_descriptor"]["addr"] = address
        return decoded.pack(decoded.check(found, "image", 1000))

    images = [packed(channels, 1000 * channels) for channels in (1, 2, 3, 4)]
    for files in (False, True):
        found: list[Any] = [b"a file", *images]
        asyncio.run(reader.settle(found, [1, 2, 3, 4], files=files))
        assert found[0] == b"a file"
        for channels, image in zip((1, 2, 3, 4), found[1:], strict=True):
            opened = Image.open(io.BytesIO(image)) if files else image
            expected = there[1000 * channels]
            assert opened.mode == "RGB" and opened.size == (5, 4)
            grey = np.repeat(expected[..., :1], 3, axis=2)
            assert (np.asarray(opened) == (grey if channels < 3 else expected[..., :3])).all()
    with pytest.raises(RequestError, match="image 1, decoded by the frontend: gone") as caught:
        asyncio.run(reader.settle([packed(3, 5)], [0]))
    assert caught.value.code == Code.PEER_DEAD


# --- the frontend's end --------------------------------------------------------------------------------------------------


def test_the_card_asks_for_it_with_the_node_s_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoding.card(MediaLimits()) == {}
    said: dict[str, Any] = {}

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return lambda value: said.update({name: value})

    for name in ("MediaDecoder", "MediaFetcher"):
        getattr(decoding, name)()  # Dynamo's own can be made
        monkeypatch.setattr(decoding, name, Recorder)
    card = decoding.card(MediaLimits(max_pixels=1000, timeout=2.5, domains=["a.example"], frontend_decoding=True))
    assert card.keys() == {"media_decoder", "media_fetcher"}
    assert said == {
        "enable_image": {"limits": {"max_alloc": 4000}},
        "timeout_ms": 2500,
        "allow_direct_ip": False,
        "allow_direct_port": False,
        "allowed_media_domains": {"a.example"},
    }
    monkeypatch.setenv("DYN_MM_ALLOW_INTERNAL", "1")
    decoding.card(LIMITS)
    assert said["allow_direct_ip"] and said["allow_direct_port"]


@pytest.mark.skipif(host.libraries() is None, reason="NIXL is not installed")
def test_the_frontend_finds_nixl_where_it_is_installed() -> None:
    config = node_config(media=MediaLimits(frontend_decoding=True))
    given = {"LD_LIBRARY_PATH": "/opt/own", "UCX_MODULES": "all"}
    first, second = launch.environment("frontend", given, config)["LD_LIBRARY_PATH"].split(os.pathsep)
    assert first == "/opt/own" and (Path(second) / host.LIBRARY).exists()
    assert launch.environment("frontend", given, config)["UCX_MODULES"] == "all"
    assert launch.environment("agent", given, config)["LD_LIBRARY_PATH"] == "/opt/own"
    assert "LD_LIBRARY_PATH" not in launch.environment("frontend", {}, node_config())
