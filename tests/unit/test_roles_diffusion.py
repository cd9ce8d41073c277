"""Images and videos: what SGLang is asked, where files go, and which requests are refused."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from shared.errors import Code, RequestError
from shared.frames import EngineFacts, Output
from shared.roles import canary, diffusion, find
from shared.roles.role import Asked, Media, Role
from tests.unit.role_bench import FACTS, only, plain, said

IMAGE, VIDEO = find("image"), find("video")
BOUNDED = msgspec.structs.replace(FACTS, max_pixels=1_000_000)
IMAGES = msgspec.structs.replace(BOUNDED, media=["image"])


def image(facts: EngineFacts = BOUNDED, **fields: Any) -> Asked:
    return plain(facts, **{"model": "m", "prompt": "p", **fields})


def params(role: Role, asked: Asked) -> dict[str, Any]:
    found: dict[str, Any] = only(role, asked)["params"]
    return found


def refusal(role: Role, asked: Asked) -> str:
    with pytest.raises(RequestError) as caught:
        role.to_engine(asked)
    assert caught.value.code == Code.INVALID
    return caught.value.message


# --- images --------------------------------------------------------------------------------------------------------------


def test_a_bare_image_request_has_the_incumbents_defaults() -> None:
    asked = plain(FACTS, model="m", prompt="p")
    found = params(IMAGE, asked)
    assert 0 <= found.pop("seed") <= 1_000_000
    assert found == {
        "prompt": "p", "negative_prompt": None, "width": 1024, "height": 1024, "num_inference_steps": 50, "guidance_scale": 7.5,
    }  # fmt: skip
    (path,) = asked.kept[diffusion.PATHS]
    assert path.startswith("users/ctx/generations/ctx/") and path.endswith(".png")


@pytest.mark.parametrize("size", [None, "auto"])
def test_a_size_of_nothing_is_the_default(size: str | None) -> None:
    assert params(IMAGE, plain(FACTS, model="m", prompt="p", size=size))["width"] == 1024


def test_samples_are_generations_of_their_own_with_seeds_that_follow() -> None:
    asked = image(n=3, size="64x32", nvext={"seed": 5, "num_inference_steps": 2, "guidance_scale": 0.0, "negative_prompt": "x"})
    found = [payload["params"] for payload in IMAGE.to_engine(asked)]
    assert [each["seed"] for each in found] == [5, 6, 7]
    assert {(each["width"], each["height"], each["guidance_scale"], each["negative_prompt"]) for each in found} == {
        (64, 32, 0.0, "x")
    }
    assert len(set(asked.kept[diffusion.PATHS])) == 3


def test_too_many_steps_of_an_image_are_as_many_as_there_may_be(caplog: pytest.LogCaptureFixture) -> None:
    assert params(IMAGE, image(size="64x64", nvext={"num_inference_steps": 200}))["num_inference_steps"] == 50
    assert "200" in caplog.text


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": None}, "prompt"),
        ({"model": None}, "model"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"size": "64"}, "size"),
        ({"size": "64x-64"}, "size"),
        ({"size": "64 x 64"}, "size"),
        ({"size": "0x64"}, "size"),
        ({"size": "1001x1000"}, "1000000"),
        ({"size": "9999999x1"}, "size"),
        ({"size": 64}, "size"),
        ({"response_format": "png"}, "response_format"),
        ({"user": 5}, "user"),
        ({"nvext": {"num_inference_steps": 0}}, "num_inference_steps"),
        ({"nvext": {"num_inference_steps": "4"}}, "num_inference_steps"),
        ({"nvext": {"guidance_scale": -0.5}}, "guidance_scale"),
        ({"nvext": {"guidance_scale": 1e6}}, "guidance_scale"),
        ({"nvext": {"seed": -1}}, "seed"),
        ({"nvext": {"seed": 2**63}}, "seed"),
        ({"input_reference": " "}, "input_reference"),
        ({"input_reference": "https://example.invalid/x.png"}, "text alone"),
    ],
)
def test_a_wrong_field_of_an_image_request_is_named(fields: dict[str, Any], named: str) -> None:
    assert named in refusal(IMAGE, image(**{"size": "64x64", **fields}))


@pytest.mark.parametrize("word", ["alice", "alice@example.com", "a-b_c.d+e", "x" * 128])
def test_an_ordinary_user_names_a_folder(word: str) -> None:
    assert diffusion.safe(word) == word


@pytest.mark.parametrize("word", ["", ".", "..", ".x", "a/b", "../x", "a\\b", "a b", "%2e%2e", "é", "\ud800", "x\n", "x" * 129])
def test_any_other_user_is_a_name_that_stands_for_it_alone(word: str) -> None:
    found = diffusion.safe(word)
    assert diffusion.SAFE.fullmatch(found) and found.startswith("x-") and found != diffusion.safe(word + "x")


def test_the_frontends_id_of_a_request_is_no_way_out_either() -> None:
    asked = replace(image(size="64x64", user=".."), context_id="../../x")
    IMAGE.to_engine(asked)
    (path,) = asked.kept[diffusion.PATHS]
    assert ".." not in path and path.count("/") == 4


def test_a_picture_is_a_chunk_with_its_place() -> None:
    asked = image(size="64x64", response_format="b64_json")
    IMAGE.to_engine(asked)
    assert asked.kept[diffusion.PATHS] == [None]
    chunk = said(IMAGE, Output("r", 0, [], {"type": "stop"}, {diffusion.PLACE: {"b64_json": "AA=="}}), 0, asked)
    assert chunk["data"] == [{"url": None, "b64_json": "AA==", "revised_prompt": None}] and chunk["created"] > 0
    assert IMAGE.to_dynamo(Output("r", 0, [], {"type": "abort"}), 0, asked) is None


def test_a_reference_is_fetched_as_any_other_picture_where_the_model_takes_one() -> None:
    url = "https://example.invalid/x.png"
    assert diffusion.wanted({"input_reference": url}, IMAGES) == {"image_url": [{"Url": url}]}
    assert diffusion.wanted({"input_reference": url}, BOUNDED) is None
    assert diffusion.wanted({"input_reference": 5}, IMAGES) is None and diffusion.wanted({}, IMAGES) is None
    asked = replace(image(IMAGES, size="64x64", input_reference=url), media=Media(["image"], [b"png"]))
    assert only(IMAGE, asked)["blobs"] == [b"png"]


# --- videos --------------------------------------------------------------------------------------------------------------


def test_a_bare_video_request_has_the_incumbents_defaults() -> None:
    asked = plain(FACTS, model="m", prompt="p")
    found = params(VIDEO, asked)
    assert 0 <= found.pop("seed") <= 1_000_000
    assert found == {
        "prompt": "p", "negative_prompt": None, "width": 832, "height": 480, "num_frames": 96, "fps": 24,
        "num_inference_steps": 50, "guidance_scale": 5.0,
    }  # fmt: skip
    assert asked.kept[diffusion.PATHS] == ["ctx.mp4"]


def test_frames_go_before_seconds() -> None:
    found = params(VIDEO, image(size="64x64", seconds=None, nvext={"num_frames": 9, "fps": 8, "guidance_scale": 0}))
    assert (found["num_frames"], found["fps"], found["guidance_scale"]) == (9, 8, 0)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"size": None}, "size is required"),
        ({"seconds": None}, "seconds is required"),
        ({"seconds": 0}, "seconds"),
        ({"seconds": 601}, "seconds"),
        ({"nvext": {"fps": None}}, "fps is required"),
        ({"nvext": {"fps": 121}}, "fps"),
        ({"nvext": {"num_inference_steps": None}}, "num_inference_steps is required"),
        ({"nvext": {"num_inference_steps": 201}}, "num_inference_steps"),
        ({"nvext": {"num_frames": 4097}}, "num_frames"),
        ({"nvext": {"guidance_scale": None}}, "guidance_scale"),
        ({"seconds": 600}, "14400 frames"),
        ({"size": "1000x1000", "nvext": {"num_frames": 17}}, "16000000 pixels"),
        ({"output_format": "webm"}, "output_format"),
        ({"response_format": "gif"}, "response_format"),
        ({"input_reference": "https://example.invalid/x.png"}, "text alone"),
    ],
)
def test_a_wrong_field_of_a_video_request_is_named(fields: dict[str, Any], named: str) -> None:
    assert named in refusal(VIDEO, image(**{"size": "64x64", **fields}))


def test_a_video_is_one_answer_with_its_place() -> None:
    asked = image(size="64x64", response_format="b64_json")
    VIDEO.to_engine(asked)
    chunk = said(VIDEO, Output("r", 0, [], {"type": "stop"}, {diffusion.PLACE: {"url": "file:///x.mp4"}}), 0, asked)
    assert (chunk["id"], chunk["status"], chunk["progress"], chunk["model"]) == ("video-ctx", "completed", 100, "m")
    assert chunk["data"] == [{"output_format": "mp4", "url": "file:///x.mp4", "b64_json": None}]
    assert chunk["error"] is None and chunk["inference_time_s"] >= 0


# --- both ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [IMAGE, VIDEO])
def test_the_canary_is_one_step_and_the_same_as_a_request(role: Role) -> None:
    own = canary.payload(role, BOUNDED, None, None)
    as_request = canary.payload(role, BOUNDED, role.canary_request(BOUNDED), None)
    assert own["canary"] and as_request["canary"] and own["params"]["num_inference_steps"] == 1
    assert own["params"] == as_request["params"]
    assert canary.ranks(role, BOUNDED) == [None]
