"""The demo models' tokenizer: byte-level BPE, trained here on three sentences; the same ids every time."""

from typing import Any

SENTENCES = (
    "The quick brown fox jumps over the lazy dog. ",
    "A node serves requests; a crash stays where it happened. ",
    "One token after another, none lost, none twice. ",
)
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")


def train(*more: str, pairs: bool = False) -> Any:
    """A tokenizer of transformers. ``more``: special tokens that follow SPECIAL's in their order.

    ``pairs``: a query and a document get the marks of a cross-encoder.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=500,
        special_tokens=[*SPECIAL, *more],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([sentence * 4 for sentence in SENTENCES], trainer)
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
