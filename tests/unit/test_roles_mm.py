"""Encode, prefill and decode of multimodal requests: what workers of both kinds tell each other, and what is refused."""

import json
from typing import Any

import msgspec
import pytest
from dynamo.sglang.protocol import DisaggSglangMultimodalRequest, SglangMultimodalRequest

from shared.blobs import BLOBS
from shared.errors import Code, RequestError
from shared.frames import Output
from shared.roles import find
from shared.roles.decode import HEALTH_CHECK
from shared.roles.role import Asked, Callee, Media, Role
from tests.unit.role_bench import BOOTSTRAP, FACTS, asked, only, plain, said

ENCODE, WORKER, PREFILL, DECODE = (find(name) for name in ("mm_encode", "mm_worker", "mm_prefill", "mm_decode"))
SEES = msgspec.structs.replace(FACTS, media=["image", "video"])
TRANSFER = {"embeddings_shape": [3, 8], "embedding_dtype_str": "bfloat16", "serialized_request": "/dev/shm/x"}
MADE = {
    "multimodal_inputs": [{"image_grid_thw": [1, 2, 6], "num_mm_tokens": 3}],
    "embeddings_shape": [3, 8],
    "transfer_payload": TRANSFER,
}


def callee(role: Role) -> Callee:
    assert role.callee is not None
    return role.callee


def with_media(**fields: Any) -> Asked:
    found = asked(SEES, multi_modal_data={"image_url": [{"Url": "data:,"}]}, **fields)
    found.media = Media(["image"], [b"png"])
    return found


def sent(**fields: Any) -> dict[str, Any]:
    """What an encode worker sends of a request with one image."""
    found = with_media(stop_conditions={"max_tokens": 4}, sampling_options={"temperature": 0.5}, **fields)
    only(ENCODE, found)
    assert ENCODE.to_dynamo(Output("r", 0, [], None, {"encoded": MADE, "input_ids": [5, 7, 7, 7, 6]}), 0, found) is None
    text = callee(ENCODE).request(found)
    assert isinstance(text, str)
    return dict(json.loads(text))


def failure(role: Role, found: Asked) -> RequestError:
    with pytest.raises(RequestError) as caught:
        role.to_engine(found)
    return caught.value


# --- encode --------------------------------------------------------------------------------------------------------------


def test_media_go_to_the_tower_and_text_to_the_worker_as_it_is() -> None:
    assert only(ENCODE, with_media()) == {"call": "encode", "input_ids": [5, 6], "media": ["image"], BLOBS: [b"png"]}
    found = asked(SEES, output_options={"logprobs": 1})
    assert ENCODE.to_engine(found) == []
    text = callee(ENCODE).request(found)
    assert isinstance(text, str)
    made = json.loads(text)
    assert made["request"]["token_ids"] == [5, 6] and made["request"]["output_options"] == {"logprobs": 1}
    assert made["multimodal_inputs"] == [] and made["transfer_payload"] is None
    assert SglangMultimodalRequest.model_validate_json(text).request.token_ids == [5, 6]


def test_the_worker_gets_expanded_ids_and_where_the_embeddings_are_and_nothing_of_the_media() -> None:
    extra = {"messages": [{"role": "user", "content": "x"}], "mm_hashes": ["a"], "kept": 1}
    made = sent(extra_args=extra, routing={"dp_rank": 3, "priority": 2, "cache_salt": "s"}, bootstrap_info={"bootstrap_room": 1})
    inner = made["request"]
    assert inner["token_ids"] == [5, 7, 7, 7, 6] and inner["sampling_options"] == {"temperature": 0.5}
    assert inner["extra_args"] == {"kept": 1} and inner["routing"] == {"priority": 2, "cache_salt": "s"}
    assert "multi_modal_data" not in inner and "bootstrap_info" not in inner
    theirs = SglangMultimodalRequest.model_validate(made)
    assert theirs.multimodal_inputs[0].num_mm_tokens == 3 and theirs.embeddings_shape == (3, 8)
    assert theirs.transfer_payload is not None and theirs.transfer_payload.serialized_request == "/dev/shm/x"


def test_chunks_of_workers_of_both_kinds_are_taken() -> None:
    take, found = callee(ENCODE).take, asked(SEES)
    chunk = {"token_ids": [4], "index": 0, "text": "", "finished": False}
    assert take(json.dumps(chunk), found) == {"token_ids": [4], "index": 0}
    assert take({"token_ids": [4], "text": "a", "finish_reason": "stop"}, found) == {
        "token_ids": [4], "text": "a", "finish_reason": "stop"
    }  # fmt: skip
    for bad in ({"token_ids": [], "finish_reason": "error", "error": "boom"}, "no JSON", "[1]"):
        with pytest.raises(RequestError) as caught:
            take(json.dumps(bad) if isinstance(bad, dict) else bad, found)
        assert caught.value.code == Code.INTERNAL


def test_an_encode_worker_refuses_what_its_model_does_not_take() -> None:
    assert failure(ENCODE, asked(SEES, multi_modal_data={"audio_url": [{"Url": "x"}]})).code == Code.INVALID
    assert "SGLang's own" in failure(ENCODE, asked(SEES, extra_args={"sglang_tito": {"text": "x"}})).message
    assert failure(ENCODE, asked(SEES, token_ids=[])).code == Code.INVALID


def test_an_encoder_s_canary_is_a_picture_and_asks_no_other_worker() -> None:
    found = plain(SEES, **ENCODE.canary_request(SEES))
    made = only(ENCODE, found)
    assert made["keep"] and made[BLOBS][0].startswith(b"\x89PNG") and made == ENCODE.canary(SEES)
    assert callee(ENCODE).request(found) is None
    assert said(ENCODE, Output("r", 0, [], {"type": "stop"}), 0, found) == {"token_ids": [], "finish_reason": "stop"}


def test_the_canary_s_picture_is_one() -> None:
    import io

    from PIL import Image

    with Image.open(io.BytesIO(ENCODE.canary(SEES)[BLOBS][0])) as image:
        image.load()
        assert image.size == (56, 56) and image.getpixel((9, 9)) == 128


# --- behind it -----------------------------------------------------------------------------------------------------------


def test_a_worker_gets_what_an_encode_worker_of_either_kind_sends() -> None:
    theirs = SglangMultimodalRequest.model_validate(sent()).model_dump(mode="json")
    for envelope in (sent(), theirs):
        made = only(WORKER, plain(**envelope))
        assert made["input_ids"] == [5, 7, 7, 7, 6] and made["sampling_params"]["temperature"] == 0.5
        encoded = made["encoded"]
        assert encoded["transfer_payload"] == TRANSFER and encoded["samples"] == 1
        assert [item["num_mm_tokens"] for item in encoded["multimodal_inputs"]] == [3]


def test_a_worker_takes_text_with_an_envelope_and_without() -> None:
    for found in (asked(), plain(request={"token_ids": [5, 6]}, multimodal_inputs=[])):
        made = only(WORKER, found)
        assert made["input_ids"] == [5, 6] and "encoded" not in made


def test_samples_share_the_embeddings() -> None:
    envelope = sent()
    envelope["request"]["sampling_options"]["n"] = 2
    made = WORKER.to_engine(plain(**envelope))
    assert [payload["encoded"]["samples"] for payload in made] == [2, 2]


def test_a_worker_s_chunk_says_whether_it_is_the_last() -> None:
    found = plain(**sent())
    only(WORKER, found)
    assert said(WORKER, Output("r", 0, [4]), 0, found) == {"index": 0, "token_ids": [4], "finished": False}
    assert said(WORKER, Output("r", 1, [], {"type": "length"}), 0, found)["finished"] is True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transfer_payload": None}, "transfer_payload is required"),
        ({"embeddings_shape": [4, 8]}, "for 3 tokens of media"),
        ({"transfer_payload": {**TRANSFER, "embeddings_shape": [2, 8]}}, "for 3 tokens of media"),
        ({"transfer_payload": {**TRANSFER, "embeddings_shape": [3]}}, "for 3 tokens of media"),
        ({"transfer_payload": {**TRANSFER, "embedding_dtype_str": "int8"}}, "embedding_dtype_str"),
        ({"multimodal_inputs": [{"num_mm_tokens": 3}]}, "either image_grid_thw or video_grid_thw"),
        ({"multimodal_inputs": [{"image_grid_thw": [1, 2], "num_mm_tokens": 3}]}, "invalid request"),
        ({"multimodal_inputs": [{"image_grid_thw": [1, 0, 2], "num_mm_tokens": 3}]}, "invalid request"),
        ({"multimodal_inputs": "x"}, "invalid request"),
    ],
)
def test_what_can_not_belong_together_is_refused(change: dict[str, Any], words: str) -> None:
    for role in (WORKER, PREFILL):
        error = failure(role, plain(**{**sent(), **change}))
        assert error.code == Code.INVALID and words in error.message


def test_a_decode_worker_asks_for_the_prompt_first_and_then_needs_places_only() -> None:
    found = plain(**sent())
    text = callee(DECODE).request(found)
    assert isinstance(text, str)
    theirs = DisaggSglangMultimodalRequest.model_validate_json(text)
    assert theirs.request.request.token_ids == [5, 7, 7, 7, 6] and theirs.sampling_params["temperature"] == 0.5
    assert callee(DECODE).take(json.dumps(BOOTSTRAP), found) is None
    made = only(DECODE, found)
    assert {name: made[name] for name in BOOTSTRAP} == BOOTSTRAP
    assert made["encoded"]["transfer_payload"] is None and made["encoded"]["embeddings_shape"] == [3, 8]


def test_a_prefill_worker_takes_what_a_decode_worker_of_either_kind_asks() -> None:
    text = callee(DECODE).request(plain(**sent()))
    assert isinstance(text, str)
    theirs = DisaggSglangMultimodalRequest.model_validate_json(text).model_dump(mode="json")
    for envelope in (json.loads(text), theirs):
        found = plain(**envelope)
        made = only(PREFILL, found)
        assert made["input_ids"] == [5, 7, 7, 7, 6] and made["sampling_params"]["max_new_tokens"] == 1
        assert made["encoded"]["transfer_payload"] == TRANSFER
        where = PREFILL.opening(found, made)
        assert where == {name: made[name] for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room")}
        assert (where["bootstrap_host"], where["bootstrap_port"]) == ("192.0.2.1", 8998)


def test_a_prefill_that_failed_says_so_instead_of_an_address() -> None:
    for chunk in ({"finish_reason": "error", "error": "boom", "bootstrap_room": 1}, "{}", "no JSON"):
        with pytest.raises(RequestError) as caught:
            callee(DECODE).take(chunk, plain(**sent()))
        assert caught.value.code == Code.INTERNAL


def test_one_sample_only_where_a_kv_cache_is_handed_over() -> None:
    envelope = sent()
    envelope["request"]["sampling_options"]["n"] = 2
    assert "n=1" in failure(PREFILL, plain(**envelope)).message
    with pytest.raises(RequestError, match="n=1"):
        callee(DECODE).request(plain(**envelope))


def test_a_decode_worker_that_knows_its_cache_asks_nobody() -> None:
    found = plain(**DECODE.canary_request(FACTS))
    assert found.request[HEALTH_CHECK] and callee(DECODE).request(found) is None
    assert only(DECODE, found)["bootstrap_host"] == "2.2.2.2"
    assert PREFILL.opening(plain(**PREFILL.canary_request(FACTS)), {}) is None


def test_workers_behind_an_encoder_register_as_the_incumbent_s_do() -> None:
    found = {role.name: (role.worker_type, role.needs, role.model_type) for role in (ENCODE, WORKER, PREFILL, DECODE)}
    assert found == {
        "mm_encode": ("Encode", (("Prefill", "Decode"), ("Aggregated",)), ""),
        "mm_worker": ("Aggregated", (("Encode",),), "Empty"),
        "mm_prefill": ("Prefill", (("Decode",),), "Empty"),
        "mm_decode": ("Decode", (("Prefill",),), "Empty"),
    }
    assert [find(role.name, text=True).model_input for role in (WORKER, PREFILL, DECODE)] == ["Tokens"] * 3
