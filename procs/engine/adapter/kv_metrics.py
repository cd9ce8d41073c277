"""SGLang's KvMetrics: how many KV blocks each DP rank uses, from its scheduler's socket as a typed frame."""

import logging
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from shared.frames import KvUse
from shared.sockets import LoopSocket


class KvMetrics:
    """Takes what the scheduler sends: it connects a PUSH and sends only with metrics and KV events both on."""

    def __init__(self, address: str, incarnation: int, block_size: int, say: Callable[[KvUse], None]) -> None:
        """``address``: SGLang's metrics_ipc_name. ``block_size`` in tokens."""
        self._incarnation = incarnation
        self._block_size = block_size
        self._say = say
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        sock = context.socket(zmq.PULL)
        sock.setsockopt(zmq.LINGER, 0)
        sock.bind(address)
        self._socket = LoopSocket(sock, self._receive)

    def close(self) -> None:
        self._socket.close()

    def _receive(self, parts: list[bytes]) -> None:
        try:
            metrics = _decode(parts[0])
            use = KvUse(
                incarnation=self._incarnation,
                dp_rank=int(metrics["data_parallel_rank"] or 0),
                used_blocks=-(-int(metrics["kv_active_blocks"]) // self._block_size),
                total_blocks=-(-int(metrics["kv_total_blocks"]) // self._block_size),
                waiting=int(metrics["num_requests_waiting"]),
                usage=float(metrics["gpu_cache_usage_perc"]),
                prefix_hit_rate=float(metrics["gpu_prefix_cache_hit_rate"]),
            )
        except Exception as error:  # a metrics message never ends the engine
            logging.warning("KvMetrics not understood: %s", error)
            return
        self._say(use)


def _decode(data: bytes) -> dict[str, Any]:
    """SGLang's KvMetrics by field name. Its "blocks" are tokens (0.5.23).

    The frame is a pickle unless SGLANG_USE_PICKLE_IPC=0. It comes from our own child over a socket file in a directory
    of mode 0700, the same channel over which SGLang's own processes exchange pickles.
    """
    fields = (
        "request_active_slots", "request_total_slots", "kv_active_blocks", "kv_total_blocks", "num_requests_waiting",
        "gpu_cache_usage_perc", "gpu_prefix_cache_hit_rate", "data_parallel_rank",
    )  # fmt: skip
    if data[:1] == b"\x80":
        import pickle

        loaded = pickle.loads(data)
        return {name: getattr(loaded, name, 0) for name in fields}
    values = msgspec.msgpack.decode(data)
    return dict(zip(fields, values[1:], strict=False))
