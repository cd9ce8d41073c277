"""The demo models' tokenizer: byte-level BPE, trained here on three sentences; the same ids every time."""

from collections.abc import Sequence
from typing import Any

SENTENCES = (
    "The quick brown fox jumps over the lazy dog. ",
    "A node serves requests; a crash stays where it happened. ",
    "One token after another, none lost, none twice. ",
)
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")


def bpe(special: Sequence[str], vocabulary: int, sentences: Sequence[str] = SENTENCES) -> Any:
    """A tokenizer of tokenizers, trained on the sentences. ``special``: its first tokens; ``vocabulary``: at most so many."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE(unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([sentence * 4 for sentence in sentences], trainer)
    return raw


def train(*more: str, pairs: bool = False) -> Any:
    """A tokenizer of transformers. ``more``: special tokens that follow SPECIAL's in their order.

    ``pairs``: a query and a document get the marks of a cross-encoder.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    raw = bpe([*SPECIAL, *more], 500)
    if pairs:
        bos, eos = SPECIAL[1:3]
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A {eos}", pair=f"{bos} $A {eos} $B:1 {eos}:1", special_tokens=[(bos, 1), (eos, 2)]
        )
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if pairs else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2],
        model_max_length=512 if pairs else 4096, model_input_names=inputs,
    )  # fmt: skip
