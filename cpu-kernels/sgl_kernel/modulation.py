"""Plain-torch stand-ins for the three operators that SGLang's diffusion models call on a CPU: norm, gate and modulation.

Rounding follows the real CPU kernels' own reference tests: sums in float32; residual and normalised value each rounded to the
input's dtype. ``weight`` and ``bias`` are [hidden], every other tensor is [batch, sequence, hidden].
"""

import torch


def fused_scale_shift_cpu(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, scale_constant: float = 1.0) -> torch.Tensor:
    """``x * (scale_constant + scale) + shift``, in ``x``'s dtype."""
    return (x.float() * (scale_constant + scale.float()) + shift.float()).to(x.dtype)


def fused_norm_scale_shift_cpu(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    norm_type: str,
    eps: float,
) -> torch.Tensor:
    """``norm(x) * (1 + scale) + shift``; ``norm_type`` is "layer" or "rms". Raises ValueError for another."""
    weight = None if weight is None else weight.float()
    if norm_type == "layer":
        shift_by = None if bias is None else bias.float()
        normalised = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], weight, shift_by, eps)
    elif norm_type == "rms":
        normalised = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight, eps)
    else:
        raise ValueError(f'norm_type: expected "layer" or "rms", got {norm_type!r}')
    return fused_scale_shift_cpu(normalised.to(x.dtype), scale, shift)


def fused_scale_residual_norm_scale_shift_cpu(
    residual: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    norm_type: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``summed = residual + x * gate``, returned second; first is ``norm(summed)`` modulated as above. No gate means one."""
    gated = x.float() if gate is None else x.float() * gate.float()
    summed = (residual.float() + gated).to(x.dtype)
    return fused_norm_scale_shift_cpu(summed, weight, bias, scale, shift, norm_type, eps), summed


_NORM = "Tensor? weight, Tensor? bias, Tensor scale, Tensor shift, str norm_type, float eps"
OPERATORS = {
    "fused_scale_shift_cpu(Tensor x, Tensor scale, Tensor shift, float scale_constant=1.0) -> Tensor": fused_scale_shift_cpu,
    f"fused_norm_scale_shift_cpu(Tensor x, {_NORM}) -> Tensor": fused_norm_scale_shift_cpu,
    f"fused_scale_residual_norm_scale_shift_cpu(Tensor residual, Tensor x, Tensor? gate, {_NORM}) -> (Tensor, Tensor)": (
        fused_scale_residual_norm_scale_shift_cpu
    ),
}
"""Each operator's schema, with the arguments in the order in which SGLang 0.5.23 gives them, and what it does."""


def register(library: torch.library.Library) -> None:
    """Define them in ``library`` (namespace sgl_kernel) for CPU tensors, but those already there."""
    for schema, operator in OPERATORS.items():
        name = schema.partition("(")[0]
        if not hasattr(torch.ops.sgl_kernel, name):
            library.define(schema)
            library.impl(name, operator, "CPU")
