"""The demo models: transformers loads them, their tokenizer keeps every byte, and two runs write the same."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)

from procs.cli import demo_model
from shared.errors import NodeError
from tests import media


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


@pytest.mark.parametrize("flags", [[], ["--arch", "qwen3"], ["--arch", "reranker"], ["--lora"], ["--vision"]], ids=" ".join)
def test_two_runs_write_the_same_bytes(flags: list[str], tmp_path: Path) -> None:
    one, again = tmp_path / "one", tmp_path / "again"
    for target in (one, again):
        assert demo_model.main([str(target), *flags]) == 0
    names = sorted(path.relative_to(one) for path in one.rglob("*"))
    assert names == sorted(path.relative_to(again) for path in again.rglob("*"))
    for name in names:
        assert (one / name).is_dir() or (one / name).read_bytes() == (again / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "one"]


def test_the_adapter_changes_a_greedy_answer_and_nothing_of_the_model(made: tuple[str, Path], tmp_path: Path) -> None:
    arch, plain = made
    target = tmp_path / "model"
    assert demo_model.main([str(target), "--arch", arch, "--lora"]) == 0
    assert (target / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    adapter = target / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 8
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    weights = load_file(adapter / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 4
    # As PEFT would merge it.
    model = AutoModelForCausalLM.from_pretrained(target)
    ids = AutoTokenizer.from_pretrained(target)("The quick brown fox", return_tensors="pt")["input_ids"]
    before = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for key in [key for key in weights if "lora_A" in key]:
        module = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        delta = weights[key.replace("lora_A", "lora_B")] @ weights[key]
        assert delta.shape == module.weight.shape
        module.weight.data += delta * config["lora_alpha"] / config["r"]
    after = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert before.tolist() != after.tolist()


def test_the_reranker_scores_pairs_and_tells_documents_apart(tmp_path: Path) -> None:
    target = tmp_path / "model"
    assert demo_model.main([str(target), "--arch", "reranker"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(target).eval()
    tokenizer = AutoTokenizer.from_pretrained(target)
    read = tokenizer("fox", "lazy dog", return_tensors="pt", return_token_type_ids=True)
    ids, types = read["input_ids"][0].tolist(), read["token_type_ids"][0].tolist()
    assert ids[0] == 1 and ids.count(2) == 2 and ids[-1] == 2
    assert types == sorted(types) and set(types) == {0, 1} and types.count(0) == ids.index(2) + 1
    scores = []
    for document in ("The quick brown fox", "lazy dog", "one token"):
        with torch.no_grad():
            scores.append(model(**tokenizer("fox", document, return_tensors="pt")).logits.item())
    assert min(abs(one - other) for one in scores for other in scores if one is not other) > 0.1


def test_the_diffusion_model_has_sdars_name_and_answers_with_what_the_tokenizer_knows(tmp_path: Path) -> None:
    target = tmp_path / "model"
    assert demo_model.main([str(target), "--arch", "sdar"]) == 0
    config = json.loads((target / "config.json").read_text())
    assert config["architectures"] == ["SDARForCausalLM"] and config["vocab_size"] > 151669
    known = len(AutoTokenizer.from_pretrained(target))
    head = load_file(target / "model.safetensors")["lm_head.weight"]
    assert not head[known:].any() and head[:known].any(dim=1).all()


def test_the_vision_model_sees_a_difference_and_its_processor_makes_a_prompt_of_images(tmp_path: Path) -> None:
    target = tmp_path / "model"
    assert demo_model.main([str(target), "--vision"]) == 0
    processor = AutoProcessor.from_pretrained(target)
    content = [{"type": "image"}, {"type": "text", "text": "fox"}]
    chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    marks = "<|vision_start|><|image_pad|><|vision_end|>"
    assert chat == f"<|bos|><|im_start|>user\n{marks}fox<|im_end|>\n<|im_start|>assistant\n"
    assert (
        json.loads((target / "preprocessor_config.json").read_text())["max_pixels"] == 256 * 28 * 28
    )  # as Dynamo's frontend reads it
    plain = processor.apply_chat_template([{"role": "user", "content": "fox"}], add_generation_prompt=True)
    assert plain == chat.replace(marks, "")
    model = AutoModelForImageTextToText.from_pretrained(target)
    answers = set()
    for seed in (1, 2, 3):
        read = processor(text=chat, images=[media.picture(seed)], return_tensors="pt")
        assert read["input_ids"][0].tolist().count(model.config.image_token_id) == 12
        new = model.generate(**read, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        answers.add(tuple(new[0, read["input_ids"].shape[1] :].tolist()))
    assert len(answers) == 3


def test_an_adapter_needs_a_decoder(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="--lora: expected --arch llama or qwen3, got reranker"):
        demo_model.main([str(tmp_path / "model"), "--arch", "reranker", "--lora"])
    assert not list(tmp_path.iterdir())


def test_a_directory_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(NodeError, match="not an empty directory"):
        demo_model.main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert demo_model.main([str(tmp_path / "empty")]) == 0
    assert (tmp_path / "empty" / "config.json").exists()


def test_a_pipeline_has_what_sglang_knows_it_by_and_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    for kind, name in (("image", "tiny-z-image"), ("video", "tiny-wan")):
        one, again = tmp_path / "one" / name, tmp_path / "again" / name
        for target in (one, again):
            assert demo_model.main([str(target), f"--{kind}"]) == 0
        files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
        assert all((one / path).read_bytes() == (again / path).read_bytes() for path in files)
        index = json.loads((one / "model_index.json").read_text())
        assert index["_class_name"] == {"image": "ZImagePipeline", "video": "WanPipeline"}[kind]
        assert {"tokenizer", "text_encoder", "transformer", "vae", "scheduler"} <= index.keys()
    shape = json.loads((tmp_path / "one" / "tiny-z-image" / "transformer" / "config.json").read_text())
    assert (shape["num_layers"], shape["num_attention_heads"]) == (1, 2)


def test_an_image_pipeline_of_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="z-image"):
        demo_model.main([str(tmp_path / "demo"), "--image"])
    assert not (tmp_path / "demo").exists()
