"""`sgnode demo-model DIR`: a tiny model with random weights and a locally trained tokenizer. It answers nonsense."""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from procs.cli import demo_pipeline
from procs.cli.demo_tokenizer import train
from procs.cli.flags import Parser
from shared.errors import NodeError

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {**SIZE, **IDS, "num_key_value_heads": 2, "max_position_embeddings": 4096}
HEAD_DIM = 16
ARCHS = {
    "llama": "a decoder",
    "qwen3": "a decoder; with --embedding-worker its embeddings have 64 dimensions",
    "reranker": "a Bert cross-encoder, for --rerank-worker",
    "sdar": "a diffusion language model, for --dllm-algorithm LowConfidence",
    "vision": "a Qwen2.5-VL, for images and text",
    "image": "a Z-Image pipeline, for --image-diffusion-worker; DIR needs z-image in its name",
    "video": "a Wan 2.1 pipeline, for --video-generation-worker",
}
FLAGS = {
    "reranker": " --rerank-worker",
    "sdar": " --dllm-algorithm LowConfidence",
    "image": " --image-diffusion-worker",
    "video": " --video-generation-worker",
}
"""Of `sgnode serve`, for those that are no ordinary worker's."""
SDAR_VOCABULARY = 151680
"""SGLang 0.5.23 takes 151669 for SDAR's mask token, whatever the tokenizer has (srt/dllm/config.py)."""
ADAPTER = "adapter"
LORA_RANK = 8
LORA_TARGETS = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "o_proj": (64, 64)}
"""What the adapter changes, with each projection's inputs and outputs."""


def main(argv: list[str]) -> int:
    """Make the model. Raises NodeError when the directory can't be written or is not empty."""
    made = Parser(prog="sgnode demo-model", description=__doc__, allow_abbrev=False)
    made.add_argument("directory", type=Path, metavar="DIR")
    shown = "; ".join(f"{name}: {what}" for name, what in ARCHS.items())
    made.add_argument("--arch", choices=tuple(ARCHS), default="llama", help=f"{shown} (default: %(default)s)")
    for arch in ("vision", "image", "video"):
        made.add_argument(f"--{arch}", dest="arch", action="store_const", const=arch, help=f"--arch {arch}")
    made.add_argument("--lora", action="store_true", help=f"also a LoRA adapter for it in DIR/{ADAPTER} (llama and qwen3)")
    found = made.parse_args(argv)
    if found.lora and found.arch not in ("llama", "qwen3"):
        raise NodeError(f"--lora: expected --arch llama or qwen3, got {found.arch}")
    target: Path = found.directory.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise NodeError(f"DIR {target}: exists and is not an empty directory")
    if found.arch in demo_pipeline.CLASSES:
        demo_pipeline.check(target, found.arch)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Made beside it and renamed: an interrupted run leaves no half of a model.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as place:
            made_in = Path(place) / "model"
            made_in.mkdir()
            (demo_pipeline.write if found.arch in demo_pipeline.CLASSES else write)(made_in, found.arch)
            if found.lora:
                write_adapter(made_in / ADAPTER)
            made_in.rename(target)
    except OSError as error:
        raise NodeError(f"DIR {target}: {error.strerror}") from error
    print(
        f"{found.directory}: a tiny {found.arch} with random weights; try `{_command(found.directory, found.arch, found.lora)}`"
    )
    return 0


def _command(directory: Path, arch: str, lora: bool) -> str:
    flags = FLAGS.get(arch, "")
    if lora:
        flags = f" --enable-lora --lora-backend torch_native --lora-paths demo={directory / ADAPTER}"
    return f"sgnode serve {directory}{flags}"


def write(target: Path, arch: str) -> None:
    """Write tokenizer, configuration and weights; the same bytes every time."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import GenerationConfig

    torch.manual_seed(0)
    with open(os.devnull, "w") as silence, contextlib.redirect_stderr(silence):
        _model(arch, target).to(torch.bfloat16).save_pretrained(target)
    if arch == "sdar":
        # transformers doesn't know the name, and writes that of the class which it was asked to save.
        config = target / "config.json"
        config.write_text(config.read_text().replace("Qwen3ForCausalLM", "SDARForCausalLM"))
    if arch != "reranker":
        GenerationConfig(**IDS).save_pretrained(target)


def _write_tokenizer(target: Path, arch: str) -> int:
    """Write it; the size of its vocabulary."""
    tokenizer = train(pairs=arch == "reranker")
    if arch != "reranker":
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(target)
    return len(tokenizer)


def _model(arch: str, target: Path) -> Any:
    """The model, whose tokenizer or processor is written first."""
    import transformers as hf

    if arch == "vision":
        from procs.cli import demo_vision

        return demo_vision.model(demo_vision.write_processor(target))
    vocabulary = _write_tokenizer(target, arch)
    shape = {**SHAPE, "vocab_size": vocabulary, "dtype": "bfloat16"}
    match arch:
        case "qwen3":
            return hf.Qwen3ForCausalLM(hf.Qwen3Config(**shape, head_dim=HEAD_DIM))
        case "sdar":
            # SDAR's layers are Qwen3's. Vectors of zero keep the answer to what the tokenizer knows.
            model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**{**shape, "vocab_size": SDAR_VOCABULARY}, head_dim=HEAD_DIM))
            model.lm_head.weight.data[vocabulary:] = 0
            return model
        case "reranker":
            # Larger weights than the usual 0.02, so that documents get scores that differ. SGLang reads position_embedding_type.
            config = hf.BertConfig(
                **SIZE,
                pad_token_id=0,
                vocab_size=vocabulary,
                max_position_embeddings=512,
                num_labels=1,
                position_embedding_type="absolute",
                initializer_range=0.3,
                dtype="bfloat16",
            )
            return hf.BertForSequenceClassification(config)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**shape))


def write_adapter(target: Path) -> None:
    """Write a LoRA adapter in PEFT's format, strong enough that a greedy answer is another than the model's own."""
    import torch
    from safetensors.torch import save_file

    target.mkdir()
    torch.manual_seed(1)
    weights = {}
    for layer in range(SIZE["num_hidden_layers"]):
        for name, (inputs, outputs) in LORA_TARGETS.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{key}.lora_A.weight"] = torch.randn(LORA_RANK, inputs, dtype=torch.bfloat16) * 0.2
            weights[f"{key}.lora_B.weight"] = torch.randn(outputs, LORA_RANK, dtype=torch.bfloat16) * 0.2
    save_file(weights, target / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "", "inference_mode": True, "bias": "none",
        "r": LORA_RANK, "lora_alpha": 2 * LORA_RANK, "lora_dropout": 0.0, "target_modules": sorted(LORA_TARGETS),
    }  # fmt: skip
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
