"""Parts behind a frame: blobs leave an output's metadata for the way and are back in it on arrival, each at its own output."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import blobs
from shared.frames import Output

HELD = st.none() | st.lists(st.binary(max_size=8), max_size=3)


def output(number: int, held: list[bytes] | None) -> Output:
    return Output(f"{number:032x}", 0, [number], None, None if held is None else {"prompt_tokens": number, blobs.BLOBS: held})


def test_a_payload_without_its_blobs_and_those() -> None:
    given_payload = {"input_ids": [1], blobs.BLOBS: [b"a", b"b"]}
    assert blobs.take(given_payload) == ({"input_ids": [1]}, [b"a", b"b"])
    assert given_payload == {"input_ids": [1], blobs.BLOBS: [b"a", b"b"]}


@pytest.mark.parametrize("holder", [None, {}, {"input_ids": [1]}])
def test_nothing_to_take(holder: dict[str, object] | None) -> None:
    plain, parts = blobs.take(holder)
    assert plain is holder
    assert parts == []


@given(st.lists(HELD, max_size=5))
def test_what_was_detached_is_attached_where_it_was(held: list[list[bytes] | None]) -> None:
    step = [output(number, each) for number, each in enumerate(held)]
    parts = blobs.detach(step)
    assert parts == [part for each in held for part in each or []]
    assert not any(blobs.BLOBS in (each.meta or {}) for each in step)
    blobs.attach(step, parts)
    assert [each.meta[blobs.BLOBS] if each.blobs and each.meta else [] for each in step] == [each or [] for each in held]
    assert [(each.meta or {}).get("prompt_tokens", 0) for each in step] == [
        0 if each is None else number for number, each in enumerate(held)
    ]


@pytest.mark.parametrize("arrived", [[], [b"a"], [b"a", b"b", b"c"]])
def test_parts_that_are_missing_or_left_over(arrived: list[bytes]) -> None:
    step = [output(0, [b"a", b"b"]), output(1, None)]
    blobs.detach(step)
    with pytest.raises(ValueError, match=f"{len(arrived)} parts behind a step that has 2"):
        blobs.attach(step, arrived)


def test_what_the_sender_keeps_is_not_changed() -> None:
    meta = {"prompt_tokens": 3, blobs.BLOBS: [b"a"]}
    blobs.detach([Output("0" * 32, 0, [], None, meta)])
    assert meta[blobs.BLOBS] == [b"a"]
