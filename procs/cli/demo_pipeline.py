"""Tiny diffusers pipelines with random weights, for image and video workers: Z-Image's and Wan 2.1's shapes."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from procs.cli.demo_tokenizer import bpe
from shared.errors import NodeError

SENTENCES = ("A curious raccoon in a field of sunflowers. ", "The quick brown fox jumps over the lazy dog. ")
SPECIAL = ("<pad>", "</s>", "<unk>")
"""Ids 0, 1 and 2, where Qwen's and T5's encoders are told to look for them."""
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
WIDTH = 64
HEADS = 2
LATENT_CHANNELS = 16
IMAGE_NAME = "z-image"
"""SGLang 0.5.23 knows Z-Image by its directory's name; by another it would run diffusers' own pipeline instead of its own."""
CLASSES = {"image": "ZImagePipeline", "video": "WanPipeline"}


def check(target: Path, kind: str) -> None:
    """Raises NodeError when the directory's name or this installation won't do."""
    if kind == "image" and IMAGE_NAME not in target.name:
        raise NodeError(f"DIR {target}: expected a name with {IMAGE_NAME!r} in it, by which SGLang knows the model")
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise NodeError(f"--{kind}: {error}") from error


def write(target: Path, kind: str) -> None:
    """Write a pipeline of ``kind`` (a key of CLASSES) into an empty directory: 1.5 or 3.2 MB, the same bytes every time."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    vocabulary = _write_tokenizer(target / "tokenizer")
    torch.manual_seed(0)
    with open(os.devnull, "w") as silence, contextlib.redirect_stderr(silence):
        parts = _image_parts(vocabulary) if kind == "image" else _video_parts(vocabulary)
        for name, part in parts.items():
            part.save_pretrained(target / name)
    index = {
        "_class_name": CLASSES[kind],
        "_diffusers_version": "0.37.0",
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        **{name: [type(part).__module__.partition(".")[0], type(part).__name__] for name, part in parts.items()},
    }
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    if kind == "image":
        # SGLang 0.5.23 reads its own names of these two, and takes Z-Image's real 30 when it finds only diffusers'.
        config = target / "transformer" / "config.json"
        shape = json.loads(config.read_text())
        shape |= {"num_layers": shape["n_layers"], "num_attention_heads": shape["n_heads"]}
        config.write_text(json.dumps(shape, indent=2) + "\n")


def _write_tokenizer(target: Path) -> int:
    """Train a byte-level tokenizer that ends each text with ``</s>``, as T5's does; the size of its vocabulary."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    raw = bpe(SPECIAL, 320, SENTENCES)
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    pad, eos, unk = SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=pad, eos_token=eos, unk_token=unk, model_max_length=512, padding_side="right"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(target)
    return len(tokenizer)


def _image_parts(vocabulary: int) -> dict[str, Any]:
    """Z-Image: one Qwen3 encoder, whose last layer but one is the condition, and a single-stream transformer."""
    import diffusers
    import torch
    import transformers

    head = WIDTH // HEADS
    encoder = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=head, max_position_embeddings=1024,
            tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        )
    )  # fmt: skip
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS, dim=WIDTH, n_layers=1, n_refiner_layers=1, n_heads=HEADS, n_kv_heads=HEADS,
        cap_feat_dim=WIDTH, axes_dims=[head // 4, head * 3 // 8, head * 3 // 8], axes_lens=[1024, 512, 512],
    )  # fmt: skip
    # diffusers leaves these two uninitialised.
    for pad_token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(pad_token, std=0.02)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=LATENT_CHANNELS, norm_num_groups=4,
        sample_size=512, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return {
        "text_encoder": encoder.to(torch.bfloat16),
        "transformer": transformer.to(torch.bfloat16),
        "vae": vae.to(torch.bfloat16),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def _video_parts(vocabulary: int) -> dict[str, Any]:
    """Wan 2.1: one UMT5 encoder, a transformer with cross-attention, and a causal video autoencoder."""
    import diffusers
    import torch
    import transformers

    encoder = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=vocabulary, d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=2 * WIDTH, num_layers=1, num_heads=HEADS,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS, text_dim=WIDTH, freq_dim=WIDTH, ffn_dim=2 * WIDTH, num_layers=1, rope_max_seq_len=1024,
    )  # fmt: skip
    return {
        "text_encoder": encoder.to(torch.bfloat16),
        "transformer": transformer,
        "vae": diffusers.AutoencoderKLWan(base_dim=8, z_dim=LATENT_CHANNELS, num_res_blocks=1),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
    }
