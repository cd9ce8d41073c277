"""The demo model: transformers loads it, its tokenizer keeps every byte, and two runs write the same."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from procs.cli import demo_model
from shared.errors import NodeError


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    target = tmp_path_factory.mktemp("made") / "model"
    assert demo_model.main([str(target), "--arch", request.param]) == 0
    return request.param, target


def test_transformers_loads_it(made: tuple[str, Path]) -> None:
    arch, target = made
    model = AutoModelForCausalLM.from_pretrained(target)
    config = model.config
    assert config.model_type == arch and str(model.dtype) == "torch.bfloat16"
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (2, 64, 4, 2)
    assert config.max_position_embeddings == 4096
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert config.vocab_size == len(tokenizer) > 256
    generation = GenerationConfig.from_pretrained(target)
    assert (generation.pad_token_id, generation.bos_token_id, generation.eos_token_id) == (0, 1, 2)
    ids = tokenizer("The quick brown fox", return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert new.shape[1] == ids.shape[1] + 8


def test_the_tokenizer_keeps_every_text_and_has_a_chat_template(made: tuple[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made[1])
    for text in ("One token after another", "žluťoučký 漢字 🙂\n\t", "  two  spaces"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|bos|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer("<|im_start|>")["input_ids"]) == 1


def test_two_runs_write_the_same_bytes(made: tuple[str, Path], tmp_path: Path) -> None:
    arch, target = made
    demo_model.main([str(tmp_path / "again"), "--arch", arch])
    names = sorted(path.name for path in target.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (target / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_a_directory_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(NodeError, match="not an empty directory"):
        demo_model.main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert demo_model.main([str(tmp_path / "empty")]) == 0
    assert (tmp_path / "empty" / "config.json").exists()
