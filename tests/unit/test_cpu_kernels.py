"""The stand-in's one real function against an independent reference, and what it must not pretend."""

import pytest
import sgl_kernel
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_assign_req_to_token_pool_equals_a_loop_over_single_slots(data: st.DataObject) -> None:
    pool, length = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 24))
    rows = data.draw(st.lists(st.integers(0, pool - 1), unique=True, max_size=pool))
    spans = [sorted((data.draw(st.integers(0, length)), data.draw(st.integers(0, length)))) for _ in rows]
    total = sum(end - start for start, end in spans)
    slots = torch.tensor(data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=total, max_size=total)), dtype=torch.int64)
    table = torch.full((pool, length), -1, dtype=torch.int32)
    expected = table.clone()
    source = iter(slots.tolist())
    for row, (start, end) in zip(rows, spans, strict=True):
        for column in range(start, end):
            expected[row, column] = next(source)
    starts = torch.tensor([start for start, _ in spans], dtype=torch.int64)
    ends = torch.tensor([end for _, end in spans], dtype=torch.int64)
    sgl_kernel.assign_req_to_token_pool_cpu(torch.tensor(rows, dtype=torch.int64), table, starts, ends, slots, length)
    assert torch.equal(table, expected)


def test_everything_else_can_be_imported_and_says_that_it_is_missing() -> None:
    from sgl_kernel import build_draft_decode_metadata_cpu

    with pytest.raises(NotImplementedError, match="GPU host"):
        build_draft_decode_metadata_cpu()
    with pytest.raises(AttributeError):
        _ = sgl_kernel.flash_attn


def test_no_operator_is_registered() -> None:
    """SGLang asks hasattr and takes a registered operator as a promise."""
    assert not hasattr(torch.ops.sgl_kernel, "convert_weight_packed")
    assert not hasattr(torch.ops.sgl_kernel, "fused_qk_norm_cpu")
