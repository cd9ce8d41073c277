"""`sgnode demo-model DIR`: a tiny model with random weights and a locally trained tokenizer. It answers nonsense."""

import contextlib
import os
import tempfile
from pathlib import Path

from procs.cli.flags import Parser
from shared.errors import NodeError

SENTENCES = (
    "The quick brown fox jumps over the lazy dog. ",
    "A node serves requests; a crash stays where it happened. ",
    "One token after another, none lost, none twice. ",
)
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Make the model. Raises NodeError when the directory can't be written or is not empty."""
    made = Parser(prog="sgnode demo-model", description=__doc__, allow_abbrev=False)
    made.add_argument("directory", type=Path, metavar="DIR")
    made.add_argument("--arch", choices=("llama", "qwen3"), default="llama", help="architecture (default: %(default)s)")
    found = made.parse_args(argv)
    target: Path = found.directory.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise NodeError(f"DIR {target}: exists and is not an empty directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Made beside it and renamed: an interrupted run leaves no half of a model.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as place:
            made_in = Path(place) / "model"
            made_in.mkdir()
            write(made_in, found.arch)
            made_in.rename(target)
    except OSError as error:
        raise NodeError(f"DIR {target}: {error.strerror}") from error
    print(f"{found.directory}: a tiny {found.arch} with random weights; try `sgnode serve {found.directory}`")
    return 0


def write(target: Path, arch: str) -> None:
    """Write tokenizer, configuration and weights; the same bytes every time."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    raw = Tokenizer(models.BPE(unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=500,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([sentence * 4 for sentence in SENTENCES], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2], model_max_length=4096
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(target)
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": len(tokenizer), "dtype": "bfloat16"}
    model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16)) if arch == "qwen3" else LlamaForCausalLM(LlamaConfig(**shape))
    with open(os.devnull, "w") as silence, contextlib.redirect_stderr(silence):
        model.to(torch.bfloat16).save_pretrained(target)
    GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2).save_pretrained(target)
