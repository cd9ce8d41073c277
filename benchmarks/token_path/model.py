"""Llama-shaped models for loads: a configuration and a tokenizer of 32,000 ids without weights (``--load-format dummy``).

usage: python -m benchmarks.token_path.model DIR 0.3b|8b
"""

import json
import sys
from pathlib import Path

SHAPES = {
    "0.3b": {"hidden_size": 1024, "num_hidden_layers": 8, "intermediate_size": 4096, "num_attention_heads": 16},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32},
}
"""0.3b: so quick that it shows what surrounds it; 8b: the speed of a model that is in use."""
VOCABULARY = 32_000
CONTEXT = 8192
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(directory: Path, shape: str) -> None:
    """Write the model; the same bytes every time."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_tokenizer(directory)
    sizes = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        **sizes,
        "num_key_value_heads": 8,
        "head_dim": sizes["hidden_size"] // sizes["num_attention_heads"],
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _write_tokenizer(directory: Path) -> int:
    """A byte-level BPE of one sentence, filled up with words of its own; the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=512, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(["The quick brown fox jumps over the lazy dog. " * 4], trainer)
    raw.add_tokens([f"w{i} " for i in range(VOCABULARY - raw.get_vocab_size())])
    pad, bos, eos = SPECIAL[:3]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=pad, bos_token=bos, eos_token=eos, model_max_length=CONTEXT
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return len(tokenizer)


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2])
