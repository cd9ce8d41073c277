"""``python -m tests.parity.incumbent``: dynamo.sglang on a host without SGLang's kernels, in this process only.

It imports Qwen3.5's model file, which names operators that the stand-in for ``sgl_kernel`` does not register. They need
to resolve; a model that calls them can't be served this way.
"""

import torch

OPERATORS = (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
)

# At import: the processes that SGLang spawns import this module again, as their main module.
_LIBRARY = torch.library.Library("sgl_kernel", "FRAGMENT")
for _operator in OPERATORS:
    if not hasattr(torch.ops.sgl_kernel, _operator):
        _LIBRARY.define(f"{_operator}(Tensor x) -> Tensor")

if __name__ == "__main__":
    from dynamo.sglang.main import main

    main()
