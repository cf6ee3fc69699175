"""All box arithmetic, on tensors with any leading dimensions.

Two conventions: cxcywh (centre x, centre y, width, height) and xyxy (left, top, right, bottom). The functions that
measure overlap take xyxy in any unit, as long as both sides use the same one. IoU is Jaccard's index; the generalized
IoU is Rezatofighi et al., arXiv 1902.09630: IoU - (hull - union) / hull, in -1..1, where the hull is the smallest box
around both. An empty box has IoU 0 with everything; no result is NaN or infinite as long as the coordinates are finite.
Half-precision boxes are measured in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Areas below this count as this: it keeps quotients and their gradients finite. In normalised coordinates it is the
# area of a box of a third of a thousandth of the image's side, far below one pixel.
_SMALLEST_AREA = 1e-7


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Corners of boxes (..., 4) given as centre and size."""
    centre, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return torch.cat((centre - size / 2, centre + size / 2), dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Centre and size of boxes (..., 4) given as corners."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def area(boxes_xyxy: Tensor) -> Tensor:
    """Areas (...) of boxes (..., 4); 0 where a box is empty or its corners are swapped."""
    return (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0).prod(dim=-1)


def clip(boxes_xyxy: Tensor, width: float | Tensor, height: float | Tensor) -> Tensor:
    """Boxes (..., 4) cut at the borders of [0, width] x [0, height], numbers or tensors that broadcast to (...)."""
    x0, y0, x1, y1 = boxes_xyxy.unbind(-1)
    return torch.stack((_between(x0, width), _between(y0, height), _between(x1, width), _between(y1, height)), dim=-1)


def elementwise_iou(boxes_xyxy_a: Tensor, boxes_xyxy_b: Tensor) -> Tensor:
    """IoU (...) of boxes (..., 4) and (..., 4), one with one, in 0..1; the shapes broadcast."""
    intersection, union, _ = _measure(boxes_xyxy_a, boxes_xyxy_b)
    return intersection / union.clamp(min=_SMALLEST_AREA)


def generalized_iou(boxes_xyxy_a: Tensor, boxes_xyxy_b: Tensor) -> Tensor:
    """Generalized IoU (...) of boxes (..., 4) and (..., 4), one with one, in -1..1; the shapes broadcast."""
    intersection, union, hull = _measure(boxes_xyxy_a, boxes_xyxy_b)
    return intersection / union.clamp(min=_SMALLEST_AREA) - (hull - union) / hull.clamp(min=_SMALLEST_AREA)


def pairwise_iou(boxes_xyxy_a: Tensor, boxes_xyxy_b: Tensor) -> Tensor:
    """IoU (..., N, M) of all pairs of boxes (..., N, 4) and (..., M, 4)."""
    return elementwise_iou(boxes_xyxy_a.unsqueeze(-2), boxes_xyxy_b.unsqueeze(-3))


def pairwise_generalized_iou(boxes_xyxy_a: Tensor, boxes_xyxy_b: Tensor) -> Tensor:
    """Generalized IoU (..., N, M) of all pairs of boxes (..., N, 4) and (..., M, 4)."""
    return generalized_iou(boxes_xyxy_a.unsqueeze(-2), boxes_xyxy_b.unsqueeze(-3))


def _measure(boxes_xyxy_a: Tensor, boxes_xyxy_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Areas of the intersection, the union and the hull, each (...)."""
    a, b = _widen(boxes_xyxy_a), _widen(boxes_xyxy_b)
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    hull_low, hull_high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = (hull_high - hull_low).clamp(min=0).prod(dim=-1)
    return intersection, area(a) + area(b) - intersection, hull


def _widen(boxes: Tensor) -> Tensor:
    """Float64 stays, everything narrower becomes float32: areas in pixels overflow float16."""
    return boxes if boxes.dtype == torch.float64 else boxes.float()


def _between(values: Tensor, high: float | Tensor) -> Tensor:
    return values.clamp(min=0).minimum(high.to(values)) if isinstance(high, Tensor) else values.clamp(min=0, max=high)
