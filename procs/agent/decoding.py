"""What the frontend is told of decoding images for this worker: on the model card, as dynamo.sglang 1.6.1 does (register.py)."""

import os
from typing import Any

from dynamo.llm import MediaDecoder, MediaFetcher

from shared.config import MediaLimits

BYTES_A_PIXEL = 4
"""Of the largest image, while it is decoded: RGBA of eight bits."""


def card(limits: MediaLimits) -> dict[str, Any]:
    """Arguments of ``register_model``; none without --frontend-decoding."""
    if not limits.frontend_decoding:
        return {}
    decoder = MediaDecoder()
    decoder.enable_image({"limits": {"max_alloc": limits.max_pixels * BYTES_A_PIXEL}})
    fetcher = MediaFetcher()
    fetcher.timeout_ms(max(1, round(limits.timeout * 1000)))
    internal = os.environ.get("DYN_MM_ALLOW_INTERNAL") == "1"
    fetcher.allow_direct_ip(internal)
    fetcher.allow_direct_port(internal)
    if limits.domains:
        fetcher.allowed_media_domains(set(limits.domains))
    return {"media_decoder": decoder, "media_fetcher": fetcher}
