"""The Triton kernels in Triton's interpreter, on the CPU, against the references.

Not collected by itself: `test_kernels_triton.py` runs it in a process of its own, since TRITON_INTERPRET=1 must be set
before the kernels are imported and makes them impossible to compile.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import cached_feature_loss, deformable_attention, feature_loss_triton
from tests import deformable_cases, feature_loss_cases
from tests.deformable_cases import SHAPES, relative_error


def _attend(name: str, tensors: tuple[Tensor, ...], backend: str) -> list[Tensor]:
    output = deformable_attention(tensors[0], SHAPES[name].levels, tensors[1], tensors[2], backend)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output, *torch.autograd.grad(output, tensors, grad)]


@pytest.mark.parametrize("name", SHAPES)
def test_deformable_attention(name: str) -> None:
    """float32 output and gradients against the float64 reference: 1e-5 of the largest element."""
    doubles = deformable_cases.inputs(SHAPES[name], torch.float64)
    singles = tuple(tensor.detach().float().requires_grad_() for tensor in doubles)
    for found, expected in zip(_attend(name, singles, "triton"), _attend(name, doubles, "reference"), strict=True):
        assert found.dtype == torch.float32
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deformable_attention_in_half_precision(dtype: torch.dtype, mixed: bool) -> None:
    """Half-precision values, the other inputs in the same dtype or (as under autocast) in float32, against the
    reference on the same numbers, which sums in float32: what differs is the rounding of each result, two units."""
    value, locations, weights = deformable_cases.inputs(SHAPES["odd width"])
    near = torch.where((locations - 0.5).abs() < 2, locations, 2.0).detach()  # fp16 cannot hold those far outside
    tensors = tuple(
        tensor.detach().to(torch.float32 if mixed and i else dtype).requires_grad_()
        for i, tensor in enumerate((value, near, weights))
    )
    found, expected = _attend("odd width", tensors, "triton"), _attend("odd width", tensors, "reference")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) < (1e-5 if ours.dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


def test_deformable_attention_with_bad_locations() -> None:
    """NaN and infinity as locations contribute what a place outside the map contributes: nothing."""
    value, locations, weights = (tensor.detach() for tensor in deformable_cases.inputs(SHAPES["odd width"]))
    results = []
    for bad in (torch.tensor([math.nan, math.inf]), torch.tensor(-9.0)):
        replaced = locations.clone()
        replaced[:, ::2, :, 1, 2] = bad
        results.append(deformable_attention(value, SHAPES["odd width"].levels, replaced, weights, "triton"))
    assert torch.equal(*results)


def test_deformable_attention_takes_expanded_gradients() -> None:
    """The gradient of a sum, one number seen everywhere: as with a copy of it."""
    tensors = deformable_cases.inputs(SHAPES["odd width"])
    output = deformable_attention(tensors[0], SHAPES["odd width"].levels, *tensors[1:], "triton")
    found = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
    expected = torch.autograd.grad(output, tensors, torch.ones_like(output))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", feature_loss_cases.CASES)
def test_feature_loss(name: str) -> None:
    """Loss and gradient against the formula in loops: 1e-5 of the largest element, one rounding step for a bf16 or fp16
    gradient; rows without a token get exactly zero."""
    case = feature_loss_cases.inputs(name)
    loss, grad = case.written_out()
    found = cached_feature_loss(*case.arguments(), backend="triton")
    (found_grad,) = torch.autograd.grad(3 * found, case.student)
    assert found.item() == pytest.approx(loss, rel=1e-5)
    assert found_grad.dtype == case.student.dtype
    tolerance = 1e-5 if found_grad.dtype == torch.float32 else torch.finfo(found_grad.dtype).eps
    assert (found_grad.double() - 3 * grad).abs().max() <= tolerance * 3 * grad.abs().max()
    assert torch.equal(found_grad == 0, (3 * grad).to(found_grad.dtype) == 0)


@pytest.mark.parametrize("name", ["int8, groups", "codes for 4", "codes for 3, channel factors"])
def test_feature_loss_in_several_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows and channels than one block holds, neither a multiple of it: against the reference, 1e-5."""
    monkeypatch.setattr(feature_loss_triton, "_TILE", 1024)  # blocks of 4 rows by 256 channels
    case = feature_loss_cases.inputs(name, channels=300, length=50, counts=(37, 0, 50))
    results = []
    for backend in ("triton", "reference"):
        loss = cached_feature_loss(*case.arguments(), backend=backend)
        results.append((loss, *torch.autograd.grad(loss, case.student)))
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-5


def test_feature_loss_without_tokens() -> None:
    """Nothing kept: loss zero, gradient zeros."""
    case = feature_loss_cases.inputs("int8", counts=(0, 0))
    loss = cached_feature_loss(*case.arguments(), backend="triton")
    (grad,) = torch.autograd.grad(loss, case.student)
    assert loss.item() == 0
    assert torch.equal(grad, torch.zeros_like(case.student))
