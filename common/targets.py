"""What the losses need of the teacher and the ground truth, computed once for every student.

Assignment, prediction quality and the weight maps of the feature losses depend on nothing that a student changes, so
phase one computes them and phase two only reads them; a live teacher computes them here too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.boxes import cxcywh_to_xyxy, pairwise_iou
from common.geometry import token_count
from common.matching import assign_queries, pad_targets
from common.records import LevelShapes, Targets
from kernels import to_device

QUALITY_EXPONENT = 0.5  # gamma of the paper's quality; its value could not be checked against the paper's text

# Of the released code's weight map.
TOP_PREDICTIONS = 100
LEAST_MASK = 1e-2


def assignment_and_quality(logits: Tensor, boxes_cxcywh: Tensor, targets: list[Targets]) -> tuple[Tensor, Tensor]:
    """The teacher's own assignment (B, L, Q) int64 (-1 for none), on the host, and the quality (B, L, Q) of its
    predictions.

    logits (B, L, Q, K) before the sigmoid, boxes_cxcywh (B, L, Q, 4).
    """
    assignment = assign_queries(logits, boxes_cxcywh, targets)
    return assignment, prediction_quality(logits, boxes_cxcywh, assignment, targets)


def prediction_quality(logits: Tensor, boxes_cxcywh: Tensor, assignment: Tensor, targets: list[Targets]) -> Tensor:
    """quality (B, L, Q) = score^g * IoU^(1-g) in 0..1, 0 for queries without a ground-truth box.

    Score: the sigmoid score of the assigned box's class; IoU: with the assigned box (DETRDistill, arXiv 2211.10156,
    section 3.3, g = .5).
    """
    padded = pad_targets(targets, logits.device)
    if not padded.labels.shape[1]:
        return logits.new_zeros(assignment.shape)
    assignment = to_device(assignment, logits.device)
    box = assignment.clamp(min=0)  # (B, L, Q); what unassigned queries pick up is masked at the end
    sample = torch.arange(len(targets), device=box.device)[:, None, None]
    score = logits.sigmoid().gather(-1, padded.labels[sample, box].unsqueeze(-1)).squeeze(-1)
    iou = pairwise_iou(cxcywh_to_xyxy(boxes_cxcywh), cxcywh_to_xyxy(padded.boxes_cxcywh).unsqueeze(1))
    iou = iou.gather(-1, box.unsqueeze(-1)).squeeze(-1)
    quality = score**QUALITY_EXPONENT * iou ** (1 - QUALITY_EXPONENT)
    return quality.where(assignment >= 0, 0.0)


def token_weights(queries: Tensor, memory: Tensor, quality: Tensor) -> Tensor:
    """Weight map W (T,) of one sample, from queries (L, Q, C), memory (T, C) and quality (L, Q).

    W(t) = sum over layers l of m_l(t)^2, m_l(t) = sum over queries n of quality_l(n) cos(query_l(n), memory(t)). The
    feature loss of layer l weighs the squared error at t by m_l(t)^2 (section 3.3); the error is the same in every
    layer, so the sum over layers needs this one map only. A sum of weighted cosines is one dot product: with unit
    vectors, m_l(t) = memory(t) . sum_n quality_l(n) query_l(n).
    """
    directions = torch.einsum("lq,lqc->lc", quality, normalize(queries.float(), dim=-1))
    masks = normalize(memory.float(), dim=-1) @ directions.T
    return masks.square().sum(dim=-1)


def released_token_weights(
    queries: Tensor,
    neck: Tensor,
    logits: Tensor,
    boxes_cxcywh: Tensor,
    target_boxes_cxcywh: Tensor,
    level_shapes: LevelShapes,
) -> Tensor:
    """Weight map W (T,) of one sample as the released code of DETRDistill computes it, over the neck's features.

    In each decoder layer l the TOP_PREDICTIONS best of score over query x class are taken, so that a query may come
    more than once: m_l(t) = sum over them of score * (largest IoU of their box with any ground-truth box, 1 without
    ground truth) * cos(query, neck(t)), at least LEAST_MASK, then divided by its largest value in t's feature level.
    The loss of layer l is a mean of (m_l(t) (F_T(t) - F_S(t)))^2; since m_l(t) is one number for all channels, the sum
    over layers is the mean of W(t) (F_T(t) - F_S(t))^2 with W(t) = sum_l m_l(t)^2, exactly.

    queries (L, Q, C), neck (T, C), logits (L, Q, K), boxes_cxcywh (L, Q, 4), target_boxes_cxcywh (G, 4) with G >= 0.
    """
    layers, count, classes = logits.shape
    scores, index = logits.float().sigmoid().flatten(1).topk(min(TOP_PREDICTIONS, count * classes), dim=1)
    query = index.div(classes, rounding_mode="floor")  # (L, N)
    if len(target_boxes_cxcywh):
        iou = pairwise_iou(cxcywh_to_xyxy(boxes_cxcywh), cxcywh_to_xyxy(target_boxes_cxcywh).expand(layers, -1, -1))
        scores = scores * iou.amax(dim=-1).gather(1, query)
    unit_queries, layer = normalize(queries.float(), dim=-1), torch.arange(layers, device=query.device).unsqueeze(1)
    directions = torch.einsum("ln,lnc->lc", scores, unit_queries[layer, query])
    masks = (normalize(neck.float(), dim=-1) @ directions.T).clamp(min=LEAST_MASK)  # (T, L)
    levels = torch.split(masks, [token_count([shape]) for shape in level_shapes])  # type: ignore[no-untyped-call]
    return torch.cat([level / level.amax(dim=0) for level in levels]).square().sum(dim=-1)
