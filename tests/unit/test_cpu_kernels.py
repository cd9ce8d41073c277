"""The stand-in's one real function against an independent reference, and what it must not pretend."""

import importlib.util
from pathlib import Path

import pytest
import sgl_kernel
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

_spec = importlib.util.spec_from_file_location("patch_installed", Path(__file__).parents[2] / "cpu-kernels/patch_installed.py")
assert _spec is not None and _spec.loader is not None
patch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(patch)


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


def test_page_locked_memory_is_ordinary_memory_and_torch_is_otherwise_the_same() -> None:
    """SGLang's LoRA asks for it; without a GPU torch refuses."""
    assert torch.tensor([1, 2], dtype=torch.int32, pin_memory=True).tolist() == [1, 2]
    assert torch.zeros(3, dtype=torch.int64, pin_memory=True).tolist() == [0, 0, 0]
    assert torch.empty((2, 3), pin_memory=True).shape == (2, 3)
    ordinary = torch.ones(2)
    assert ordinary.pin_memory() is ordinary
    with torch.device("meta"):
        assert torch.zeros(2).device.type == torch.empty(2).device.type == torch.tensor([1]).device.type == "meta"
    event = torch.cuda.Event()
    event.record()
    assert event.query()


def _installed(tmp_path: Path, text: str) -> Path:
    target = tmp_path / patch.SENDER
    target.parent.mkdir(parents=True)
    target.write_text(text)
    return target


def test_the_sender_is_changed_once_and_a_second_run_changes_nothing(tmp_path: Path) -> None:
    target = _installed(tmp_path, f"class Sender:\n{patch.PINNED}\n")
    for _ in range(2):
        patch.send_without_page_locked_memory(tmp_path)
        assert target.read_text() == f"class Sender:\n{patch.PLAIN}\n"


@pytest.mark.parametrize("text", ["class Sender:\n    pass\n", f"class One:\n{patch.PINNED}class Two:\n{patch.PINNED}"])
def test_another_sender_than_the_tested_one_fails_the_setup(tmp_path: Path, text: str) -> None:
    target = _installed(tmp_path, text)
    with pytest.raises(SystemExit, match="another SGLang than the tested one"):
        patch.send_without_page_locked_memory(tmp_path)
    assert target.read_text() == text


def test_the_installed_files_are_changed() -> None:
    assert patch.PLAIN in (patch.package("sglang") / patch.SENDER).read_text()
    assert (patch.package("torchvision") / "_meta_registrations.py").read_text() == ""


def test_registrations_that_are_not_there_fail_the_setup(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such file"):
        patch.empty_torchvision_registrations(tmp_path)


# --- modulation ----------------------------------------------------------------------------------------------------------

SHAPE = (2, 3, 8)


def _tensors(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=made).to(torch.bfloat16) for shape in shapes]


def _norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, kind: str, eps: float) -> torch.Tensor:
    """By its definition, in float32."""
    wide = x.float()
    if kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps)
    wide = wide if weight is None else wide * weight.float()
    return (wide if bias is None else wide + bias.float()).to(x.dtype)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("weighted", [True, False])
def test_a_modulated_norm_equals_its_definition(kind: str, weighted: bool) -> None:
    x, scale, shift = _tensors(1, SHAPE, SHAPE, SHAPE)
    weight, bias = _tensors(2, SHAPE[-1:], SHAPE[-1:]) if weighted else (None, None)
    bias = bias if kind == "layer" else None
    found = torch.ops.sgl_kernel.fused_norm_scale_shift_cpu(x, weight, bias, scale, shift, kind, 1e-6)
    expected = _norm(x, weight, bias, kind, 1e-6).float() * (1 + scale.float()) + shift.float()
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)
    assert found.dtype == x.dtype


@pytest.mark.parametrize("gated", [True, False])
def test_the_residual_is_added_before_the_norm_and_comes_back_as_well(gated: bool) -> None:
    residual, x, gate, scale, shift = _tensors(3, *[SHAPE] * 5)
    chosen = gate if gated else None
    found, summed = torch.ops.sgl_kernel.fused_scale_residual_norm_scale_shift_cpu(
        residual, x, chosen, None, None, scale, shift, "rms", 1e-6
    )
    total = (residual.float() + (x.float() * gate.float() if gated else x.float())).to(x.dtype)
    assert torch.equal(summed, total)
    assert torch.equal(found, torch.ops.sgl_kernel.fused_norm_scale_shift_cpu(total, None, None, scale, shift, "rms", 1e-6))


def test_scale_and_shift_with_another_constant_and_another_norm() -> None:
    x, scale, shift = _tensors(4, *[SHAPE] * 3)
    found = torch.ops.sgl_kernel.fused_scale_shift_cpu(x, scale, shift, 0.0)
    assert torch.equal(found, (x.float() * scale.float() + shift.float()).to(x.dtype))
    with pytest.raises(ValueError, match="norm_type"):
        torch.ops.sgl_kernel.fused_norm_scale_shift_cpu(x, None, None, scale, shift, "batch", 1e-6)
