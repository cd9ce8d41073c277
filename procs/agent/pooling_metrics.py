"""An embedding worker's histograms: names and buckets of dynamo.sglang 1.6.1 (request_handlers/embedding/metrics.py).

That module can't be imported here: its package imports SGLang.
"""

from typing import Any

from prometheus_client import CollectorRegistry, Histogram

BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
TOKEN_BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class PoolingMetrics:
    """Observes answers of the role ``embedding``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._batch = Histogram(
            "dynamo_embedding_batch_size",
            "Number of inputs per /v1/embeddings request. One sample per request, not per input.",
            labelnames=("model",),
            buckets=BATCH_BUCKETS,
            registry=registry,
        )
        self._tokens = Histogram(
            "dynamo_embedding_input_tokens",
            "Total prompt tokens summed across all inputs in a /v1/embeddings request. One sample per request.",
            labelnames=("model",),
            buckets=TOKEN_BUCKETS,
            registry=registry,
        )

    def observe(self, answer: Any) -> None:
        """One answer as it leaves for the frontend."""
        self._batch.labels(model=answer["model"]).observe(len(answer["data"]))
        self._tokens.labels(model=answer["model"]).observe(answer["usage"]["prompt_tokens"])
