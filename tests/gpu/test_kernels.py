"""Each operator as the device runs it ("auto": Triton on CUDA, numba on the CPU) against references in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kernels import cached_feature_loss, deformable_attention, nearest_codes
from kernels.matching import hungarian_start
from tests import deformable_cases, feature_loss_cases
from tests.deformable_cases import SHAPES, Shape, relative_error
from tests.gpu.devices import HAS_CUDA, devices_and

COCO_LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))  # of 800 x 1333 pixels
COCO_TOKENS = sum(height * width for height, width in COCO_LEVELS)
COCO = {
    "COCO, encoder": Shape(2, COCO_TOKENS, 8, 32, COCO_LEVELS, 4),
    "COCO, decoder": Shape(2, 300, 8, 32, COCO_LEVELS, 4),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tolerance_of(dtype: torch.dtype, float32: float) -> float:
    """Sums are float32 in every version, so that half precision only rounds what goes in and what comes out."""
    return float32 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("device", "name"), devices_and(SHAPES, COCO))
def test_deformable_attention(device: str, name: str, dtype: torch.dtype) -> None:
    """Output and the three gradients against the plain version in float64 on the same device and the same rounded
    values: in float32 to 1e-5 of the largest element (COCO's sizes: 1e-4, for a float32 location on a map of 167 cells
    is that coarse), else to two roundings."""
    shape = (SHAPES | COCO)[name]
    value, locations, weights = (tensor.detach().to(device) for tensor in deformable_cases.inputs(shape))
    value = value.to(dtype)
    grad = torch.randn(
        shape.batch, shape.queries, shape.heads * shape.width, generator=torch.Generator().manual_seed(1)
    )
    results = []
    for tensors, backend in (
        ((value, locations, weights), "auto"),
        ((value.double(), locations.double(), weights.double()), "reference"),
    ):
        leaves = tuple(tensor.clone().requires_grad_() for tensor in tensors)
        output = deformable_attention(leaves[0], shape.levels, leaves[1], leaves[2], backend)
        results.append([output, *torch.autograd.grad(output, leaves, grad.to(output))])
    assert [tensor.dtype for tensor in results[0]] == [dtype, dtype, torch.float32, torch.float32]
    for found, expected in zip(*results, strict=True):
        assert found.device.type == device
        assert relative_error(found, expected) < tolerance_of(dtype, 1e-4 if name in COCO else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("device", "size"), devices_and(["odd"], ["COCO"]))
@pytest.mark.parametrize("name", feature_loss_cases.CASES)
def test_feature_loss(device: str, size: str, name: str, dtype: torch.dtype) -> None:
    """Loss and gradient against the plain version in float64: the loss to 1e-5, the gradient to 1e-5 or two roundings.
    odd: samples of 5, 0 and 9 tokens of 12 channels; COCO: of 22,223, 0 and 5,555, of 256 channels."""
    if size == "odd":
        case = feature_loss_cases.inputs(name)
    else:
        channels = 252 if "3" in name else 256  # a multiple of the codes' width, and of the groups
        case = feature_loss_cases.inputs(name, channels, COCO_TOKENS, (COCO_TOKENS, 0, COCO_TOKENS // 4))
    rounded = case.student.detach().to(dtype)
    others = case.arguments()[1:]
    student = rounded.to(device).requires_grad_()
    loss = cached_feature_loss(student, *(None if tensor is None else tensor.to(device) for tensor in others))
    expected_student = rounded.double().requires_grad_()
    expected = cached_feature_loss(expected_student, *others, backend="reference")
    (grad,), (expected_grad,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, expected_student)
    assert (loss.device.type, grad.dtype) == (device, dtype)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(grad.cpu(), expected_grad) < tolerance_of(dtype, 1e-5)


@pytest.mark.parametrize("targets", [1, 20, 300, 330])
def test_hungarian(device: str, targets: int) -> None:
    """The total cost of each matching against scipy's; a GPU's costs are overwritten right after the start. The result
    is where the costs are, rows that the mask leaves out stay out, none is matched twice."""
    generator = torch.Generator().manual_seed(targets)
    costs = torch.rand(6, 2, 300, targets, generator=generator)
    rows = torch.rand(2, 300, generator=generator) < 0.8
    there = costs.to(device, copy=True)
    matching = hungarian_start(there, rows.to(device))
    if device == "cuda":  # on the CPU the costs themselves are read
        there.zero_()
    found = matching.result()
    assert found.device.type == device
    for layer, image in np.ndindex(6, 2):
        cost = costs[layer, image].double().numpy()
        row_of_column = found[layer, image].cpu().numpy()
        (columns,) = np.nonzero(row_of_column >= 0)
        chosen = row_of_column[columns]
        allowed = np.flatnonzero(rows[image].numpy())
        assert len({*chosen.tolist()}) == len(columns) == min(len(allowed), targets)
        assert np.isin(chosen, allowed).all()
        best = cost[allowed][linear_sum_assignment(cost[allowed])].sum()
        assert cost[chosen, columns].sum() == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(("device", "tokens"), devices_and([100], [12_100]))
def test_nearest_codes(device: str, tokens: int) -> None:
    """Each code's distance against the smallest in float64: no further than 1e-4 of it (of equals, any is nearest)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(tokens, 256, generator=generator)
    codebooks = torch.randn(32, 256, 8, generator=generator)
    codes = nearest_codes(features.to(device), codebooks.to(device))
    assert codes.device.type == device
    parts: Tensor = features.double().view(-1, 32, 8).transpose(0, 1)
    for group, (part, centroids) in enumerate(zip(parts, codebooks.double(), strict=True)):
        distances = torch.cdist(part, centroids)
        chosen = distances.gather(1, codes[:, group, None].long().cpu())[:, 0]
        assert ((chosen / distances.min(1).values) < 1 + 1e-4).all()


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_backward_frees_what_it_took() -> None:
    """Ten passes through deformable attention end with as much of the device's memory in use as one; the CPU's memory
    is not torch's to count."""
    shape = COCO["COCO, encoder"]
    tensors = [tensor.detach().cuda().requires_grad_() for tensor in deformable_cases.inputs(shape)]
    used = []
    for _ in range(10):
        output = deformable_attention(tensors[0], shape.levels, tensors[1], tensors[2])
        torch.autograd.grad(output.sum(), tensors)
        del output
        used.append(torch.cuda.memory_allocated())
    assert used[-1] == used[0]
