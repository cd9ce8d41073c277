"""Stand-in for SGLang's kernel package ``sgl_kernel`` on a host without a GPU. Tests and demos only.

What it is: SGLang 0.5.23 imports ``sgl_kernel`` on every host, and its CPU build is on no package
index. For Llama and Qwen3 on a CPU without AMX, SGLang falls back to native torch wherever it asks
``hasattr`` or ``cpu_has_amx_support``; the one kernel it calls unconditionally is
``assign_req_to_token_pool_cpu``, implemented here in plain torch.

What it is not: a kernel library. Every other ``*_cpu`` name can be imported and raises
``NotImplementedError`` when called (so speculative decoding, AMX attention and quantised CPU paths do
not work). Of ``torch.ops.sgl_kernel`` seven operators are there. Three are what SGLang's diffusion models
call on a CPU, in plain torch (``modulation``). Four are named by its Qwen3.5 model file when that is imported
(dynamo.sglang imports it for every model): calling one raises too. SGLang takes any other registered operator
as a promise. It never goes onto a GPU host: there the real ``sglang-kernel`` is installed.

On a host without CUDA it also replaces ``torch.cuda.Event`` by one that does nothing, which SGLang's
overlap scheduling creates during prefill/decode disaggregation even on a CPU, and page-locked memory
by ordinary memory: SGLang's LoRA asks for it on every device, and only a GPU's driver has it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from sgl_kernel import modulation

__version__ = "0.0.0+cpu.stand.in"


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offsets: torch.Tensor,
    end_offsets: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write each request's newly allocated KV slots into its row of ``req_to_token``, in place.

    Shapes: ``req_pool_indices``, ``start_offsets``, ``end_offsets`` [batch]; ``req_to_token``
    [pool, pool_len]; ``out_cache_loc`` [sum(end - start)]. Row ``req_pool_indices[i]`` receives the next
    ``end[i] - start[i]`` entries of ``out_cache_loc`` at columns ``start[i]:end[i]``, cast to its dtype.
    Source: the Triton kernel of the same name in SGLang 0.5.23, ``srt/mem_cache/allocation.py``.
    """
    taken = 0
    rows = req_pool_indices.tolist()
    for row, start, end in zip(rows, start_offsets.tolist(), end_offsets.tolist(), strict=True):
        count = end - start
        req_to_token[row, start:end] = out_cache_loc[taken : taken + count].to(req_to_token.dtype)
        taken += count


class _NullEvent:
    """``torch.cuda.Event`` where there is no CUDA: nothing is asynchronous, so everything is done."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def record(self, *_args: Any) -> None: ...

    def wait(self, *_args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _without_pinning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function of torch that makes a tensor, deaf to ``pin_memory``."""

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return made


def __getattr__(name: str) -> Any:
    if not name.endswith("_cpu"):
        raise AttributeError(f"module 'sgl_kernel' (CPU stand-in) has no attribute {name!r}")

    def missing(*_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} is not in the CPU stand-in; run this model on a GPU host")

    missing.__name__ = name
    return missing


if not torch.cuda.is_available():
    torch.cuda.Event = _NullEvent  # type: ignore[misc, assignment]
    torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign]
    # `with torch.device(...)` keeps a set of the functions that it applies to, made when it is first asked: before this.
    _device_constructors()
    # Those that SGLang 0.5.23 calls with pin_memory=True for its LoRA backend torch_native (srt/lora).
    for _name in ("tensor", "empty", "zeros"):
        setattr(torch, _name, _without_pinning(getattr(torch, _name)))

_NAMED_AT_IMPORT = (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)
_library = torch.library.Library("sgl_kernel", "FRAGMENT")
for _name in _NAMED_AT_IMPORT:
    # A program may have named them before it imported SGLang.
    if not hasattr(torch.ops.sgl_kernel, _name):
        _library.define(f"{_name}(Tensor x) -> Tensor")

modulation.register(_library)
