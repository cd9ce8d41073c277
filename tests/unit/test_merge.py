"""Two outputs of one request as one: tokens, text, what is there once a token, and SGLang's own answer."""

from typing import Any

import pytest

from shared.frames import Output
from shared.merge import merge


def joined(older: dict[str, Any] | None, newer: dict[str, Any] | None) -> Any:
    return merge(Output("r", 0, [1], None, older), Output("r", 1, [2], None, newer)).meta


def test_tokens_and_finish() -> None:
    found = merge(Output("r", 3, [1, 2]), Output("r", 5, [3], {"type": "stop"}))
    assert (found.offset, found.token_ids, found.finish, found.text) == (3, [1, 2, 3], {"type": "stop"}, None)


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_gap_or_a_repetition_is_an_error(offset: int) -> None:
    with pytest.raises(ValueError, match=f"tokens 2 to {offset} are missing"):
        merge(Output("r", 0, [1, 2]), Output("r", offset, [3]))


@pytest.mark.parametrize(
    ("older", "newer", "expected"), [("a", "b", "ab"), (None, "b", "b"), ("a", None, "a"), (None, None, None), ("", "", "")]
)
def test_text_is_joined(older: str | None, newer: str | None, expected: str | None) -> None:
    assert merge(Output("r", 0, [1], text=older), Output("r", 1, [2], text=newer)).text == expected


def test_what_is_there_once_a_token_is_joined_and_the_rest_is_the_newer_one() -> None:
    older = {"prompt_tokens": 4, "completion_tokens": 1, "output_token_logprobs": [[-1, 1]], "output_top_logprobs": [[1]]}
    newer = {"completion_tokens": 2, "output_token_logprobs": [[-2, 2]], "output_top_logprobs": None}
    assert joined(older, newer) == {
        "prompt_tokens": 4,
        "completion_tokens": 2,
        "output_token_logprobs": [[-1, 1], [-2, 2]],
        "output_top_logprobs": None,
    }
    assert joined(None, newer) == newer and joined(older, None) == older and joined(None, None) is None


def test_the_parts_of_an_answer_stay_as_they_were() -> None:
    older = {"output_token_logprobs": [[-1, 1]]}
    joined(older, {"output_token_logprobs": [[-2, 2]]})
    assert older == {"output_token_logprobs": [[-1, 1]]}


def test_sglang_s_own_answer_is_joined_inside() -> None:
    def answer(number: int, **more: Any) -> dict[str, Any]:
        meta = {"completion_tokens": number, "output_token_logprobs": [[-number, number]], **more}
        return {"native": {"meta_info": meta, "hidden_states": [number]}}

    found = joined(answer(1, id="x"), answer(2, finish_reason={"type": "stop"}))
    assert found == {
        "native": {
            "meta_info": {
                "id": "x",
                "completion_tokens": 2,
                "output_token_logprobs": [[-1, 1], [-2, 2]],
                "finish_reason": {"type": "stop"},
            },
            "hidden_states": [2],
        }
    }
    assert joined({"native": {"a": 1}}, {"native": None}) == {"native": None}


def test_many_are_one_in_the_end() -> None:
    whole = Output("r", 0, [0], None, {"output_token_logprobs": [[0]]}, "0")
    for number in range(1, 50):
        whole = merge(whole, Output("r", number, [number], None, {"output_token_logprobs": [[number]]}, str(number % 10)))
    assert whole.token_ids == list(range(50)) and whole.meta == {"output_token_logprobs": [[n] for n in range(50)]}
    assert whole.text == "".join(str(n % 10) for n in range(50))


def test_blobs_are_joined() -> None:
    assert joined({"blobs": [b"1"]}, {"blobs": [b"2", b"3"]}) == {"blobs": [b"1", b"2", b"3"]}
