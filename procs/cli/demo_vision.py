"""`sgnode demo-model --vision`: a tiny Qwen2.5-VL with random weights and its processor."""

import json
from pathlib import Path
from typing import Any

from procs.cli.demo_model import IDS, SHAPE
from procs.cli.demo_tokenizer import train

SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] in ('video', 'video_url') %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIXELS = {"min_pixels": 4 * 28 * 28, "max_pixels": 256 * 28 * 28}
"""Of one image after its resizing: a prompt gets one token for 28 by 28 pixels, so 4 to 256."""
VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": SHAPE["hidden_size"],
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [1],
    "hidden_act": "silu",
    "initializer_range": 0.1,
}
"""Larger weights than the usual 0.02, so that two images get answers that differ."""
MROPE_SECTION = [2, 3, 3]
"""Time, height and width in the rotary position: their sum is half a head's dimension."""


def write_processor(target: Path) -> Any:
    """Write tokenizer and processor; the tokenizer."""
    import transformers as hf

    tokenizer = train(*SPECIAL)
    processor = hf.Qwen2_5_VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**PIXELS),
        tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(**PIXELS),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(target)
    # Real models have it beside processor_config.json's later form; Dynamo's frontend counts an image's tokens by it, and by
    # the older names of its bounds, which transformers reads but doesn't write.
    (written,) = processor.image_processor.save_pretrained(target)
    settings = {**json.loads(Path(written).read_text()), **PIXELS}
    Path(written).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return tokenizer


def model(tokenizer: Any) -> Any:
    import transformers as hf

    start, end, image, video = tokenizer.convert_tokens_to_ids(list(SPECIAL))
    text = {
        **SHAPE,
        "vocab_size": len(tokenizer),
        "initializer_range": VISION["initializer_range"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": MROPE_SECTION},
    }
    config = hf.Qwen2_5_VLConfig(
        text_config=text, vision_config=VISION, tie_word_embeddings=False, dtype="bfloat16",
        vision_start_token_id=start, vision_end_token_id=end, image_token_id=image, video_token_id=video, **IDS,
    )  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration(config)
