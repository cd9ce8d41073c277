"""Media of a request as roles pass them on: who takes which, what goes along, and what is refused before the engine has it."""

from typing import Any

import msgspec
import pytest

from shared.blobs import BLOBS
from shared.errors import Code, RequestError
from shared.roles import ROLES, media
from shared.roles.role import Asked, Media
from tests.unit.role_bench import FACTS, asked, only

SEEING = msgspec.structs.replace(FACTS, media=["image"])
ROLE = ROLES["aggregated"]
DATA = {"multi_modal_data": {"image_url": [None]}}


def seen(*blobs: bytes, facts: Any = SEEING, **fields: Any) -> Asked:
    """A request whose images were fetched."""
    found = asked(facts, **{**DATA, **fields})
    found.media = Media(["image"] * len(blobs), list(blobs))
    return found


def refusal(found: Asked) -> str:
    with pytest.raises(RequestError) as caught:
        ROLE.to_engine(found)
    assert caught.value.code == Code.INVALID
    return caught.value.message


@pytest.mark.parametrize("name", ["aggregated", "prefill", "decode"])
def test_kinds_and_contents_go_to_the_engine(name: str) -> None:
    fields = {"bootstrap_info": {"bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": 2}} if name != "aggregated" else {}
    found = seen(b"one", b"two", **fields)
    payload = only(ROLES[name], found)
    assert payload["media"] == ["image", "image"] and payload[BLOBS] == [b"one", b"two"]
    assert found.media is not None
    found.media.blobs.clear()  # as they are when the engine has answered
    assert payload[BLOBS] == [b"one", b"two"]


def test_a_request_without_media_has_none_of_that() -> None:
    assert {"media", BLOBS, "mm_hashes"}.isdisjoint(only(ROLE, asked(SEEING)))


def test_each_sample_has_them_while_they_are_not_too_many() -> None:
    payloads = ROLE.to_engine(seen(b"one", sampling_options={"n": 3}))
    assert [payload[BLOBS] for payload in payloads] == [[b"one"]] * 3
    half = bytes(media.COPIES_BYTES // 2)
    assert len(ROLE.to_engine(seen(half, sampling_options={"n": 2}))) == 2
    assert "n: 3 samples" in refusal(seen(half, sampling_options={"n": 3}))
    assert only(ROLE, seen(half, half, half, sampling_options={"n": 1}))["media"] == ["image"] * 3


def test_what_the_model_does_not_take_is_refused_by_its_name() -> None:
    assert "does not accept image input; received unsupported content type 'image_url'" in refusal(seen(b"one", facts=FACTS))
    assert "does not accept video input" in refusal(seen(b"one", multi_modal_data={"image_url": [None], "video_url": ["u"]}))
    assert "does not accept multi_modal_data" in refusal(asked(SEEING, multi_modal_data="x"))


def test_what_the_messages_have_must_have_come() -> None:
    messages = {"extra_args": {"messages": [{"content": [{"type": "image_url"}]}]}}
    assert "multi_modal_data has none" in refusal(asked(SEEING, **messages))
    assert only(ROLE, seen(b"one", **messages))["media"] == ["image"]


@pytest.mark.parametrize("kind", [None, 5, [], {}, ["image_url"]], ids=str)
def test_a_part_of_no_known_type_is_no_media(kind: Any) -> None:
    assert media.named({"messages": [{"content": [{"type": kind}]}], "extra_args": 5}) == set()


HASHES = ["0" * 16, "1" * 16]


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        ({"mm_hashes": HASHES}, HASHES),
        ({"mm_hashes_by_modality": {"image": HASHES}}, HASHES),
        ({"mm_hashes_by_modality": {"image": HASHES}, "mm_hashes": HASHES[::-1]}, HASHES),
        ({"mm_hashes_by_modality": {"image": 5}, "mm_hashes": HASHES}, HASHES),
        ({"mm_hashes_by_modality": 5}, None),
        ({"mm_hashes": HASHES[:1]}, None),
        ({"mm_hashes": [1, 2]}, None),
        ({"mm_hashes": 5}, None),
    ],
)
def test_the_router_s_names_go_along_where_they_fit(extra: dict[str, Any], found: list[str] | None) -> None:
    assert only(ROLE, seen(b"one", b"two", extra_args=extra)).get("mm_hashes") == found
