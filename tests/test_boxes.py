"""Box arithmetic against torchvision.ops, and where torchvision has no answer, against the definition."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor

from common import boxes


def random_boxes_xyxy(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Boxes inside [0, scale], none empty, float64."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(*shape, 2, 2, generator=generator, dtype=torch.float64) * scale
    low, high = corners.amin(-2), corners.amax(-2)
    return torch.cat((low, high + 0.01 * scale), dim=-1)


def test_conversions_equal_torchvision_and_invert_each_other() -> None:
    """Both directions against torchvision.ops.box_convert, and a round trip; float64, 1e-12."""
    xyxy = random_boxes_xyxy(3, 17, seed=0)
    cxcywh = boxes.xyxy_to_cxcywh(xyxy)
    expected = torchvision.ops.box_convert(xyxy, "xyxy", "cxcywh")
    torch.testing.assert_close(cxcywh, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(boxes.cxcywh_to_xyxy(cxcywh), xyxy, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 640.0])
def test_pairwise_overlaps_equal_torchvision(scale: float) -> None:
    """A batch of unequal sets against torchvision's two-dimensional functions, one by one; float64, 1e-12."""
    a, b = random_boxes_xyxy(4, 9, seed=1, scale=scale), random_boxes_xyxy(4, 13, seed=2, scale=scale)
    iou, giou = boxes.pairwise_iou(a, b), boxes.pairwise_generalized_iou(a, b)
    assert iou.shape == giou.shape == (4, 9, 13)
    for i in range(4):
        torch.testing.assert_close(iou[i], torchvision.ops.box_iou(a[i], b[i]), rtol=0, atol=1e-12)
        torch.testing.assert_close(giou[i], torchvision.ops.generalized_box_iou(a[i], b[i]), rtol=0, atol=1e-12)


def test_elementwise_overlaps_are_the_diagonal_of_the_pairwise_ones() -> None:
    """Exactly equal: it is the same arithmetic."""
    a, b = random_boxes_xyxy(2, 11, seed=3), random_boxes_xyxy(2, 11, seed=4)
    giou = boxes.pairwise_generalized_iou(a, b).diagonal(dim1=-2, dim2=-1)
    assert torch.equal(boxes.generalized_iou(a, b), giou)
    assert torch.equal(boxes.elementwise_iou(a, b), boxes.pairwise_iou(a, b).diagonal(dim1=-2, dim2=-1))


def test_area_and_clip_equal_torchvision() -> None:
    """Boxes that leave the image on every side, float64, exactly equal."""
    xyxy = random_boxes_xyxy(40, seed=5, scale=300.0) - 100.0
    expected = torchvision.ops.clip_boxes_to_image(xyxy, (90, 120))
    assert torch.equal(boxes.clip(xyxy, width=120, height=90), expected)
    torch.testing.assert_close(boxes.area(expected), torchvision.ops.box_area(expected), rtol=1e-12, atol=0)


def test_clip_takes_one_size_per_box() -> None:
    """Sizes given as tensors against the same call per box."""
    xyxy = random_boxes_xyxy(5, seed=6, scale=300.0)
    widths, heights = torch.tensor([10.0, 50.0, 100.0, 200.0, 400.0]), torch.tensor([300.0, 20.0, 7.0, 150.0, 90.0])
    expected = torch.stack([boxes.clip(xyxy[i], float(widths[i]), float(heights[i])) for i in range(5)])
    assert torch.equal(boxes.clip(xyxy, widths, heights), expected)


def test_empty_and_degenerate_boxes_give_finite_values_and_gradients() -> None:
    """Points, lines and swapped corners against themselves and a real box: finite, IoU 0, GIoU in -1..1."""
    degenerate = torch.tensor(
        [[0.5, 0.5, 0.5, 0.5], [0.2, 0.1, 0.2, 0.9], [0.0, 0.0, 0.0, 0.0], [0.6, 0.6, 0.4, 0.4], [0.1, 0.1, 0.7, 0.8]],
        requires_grad=True,
    )
    iou = boxes.pairwise_iou(degenerate, degenerate)
    giou = boxes.pairwise_generalized_iou(degenerate, degenerate)
    assert iou[:4].abs().max() == 0
    assert iou[4, 4] == 1
    assert giou.abs().max() <= 1
    giou.sum().backward()
    assert degenerate.grad is not None
    assert degenerate.grad.isfinite().all()


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_no_boxes_give_empty_matrices(n: int, m: int) -> None:
    assert boxes.pairwise_iou(torch.zeros(2, n, 4), torch.zeros(2, m, 4)).shape == (2, n, m)
    assert boxes.pairwise_generalized_iou(torch.zeros(2, n, 4), torch.zeros(2, m, 4)).shape == (2, n, m)


def test_half_precision_boxes_are_measured_in_float32() -> None:
    """Areas of 600 x 600 pixels overflow float16: against the same boxes widened first, exactly equal."""
    a = random_boxes_xyxy(6, seed=7, scale=600.0).half()
    iou = boxes.pairwise_iou(a, a)
    assert iou.dtype == torch.float32
    assert torch.equal(iou, boxes.pairwise_iou(a.float(), a.float()))


def test_generalized_iou_gradient() -> None:
    """Against finite differences in float64 (gradcheck's default tolerances)."""
    a, b = random_boxes_xyxy(5, seed=8).requires_grad_(), random_boxes_xyxy(5, seed=9).requires_grad_()
    assert torch.autograd.gradcheck(boxes.generalized_iou, (a, b))
