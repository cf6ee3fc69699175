"""What the losses need of the teacher and the ground truth, computed once for every student.

Assignment, prediction quality and the weight map of the feature loss depend on nothing that a student changes, so
phase one computes them and phase two only reads them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.boxes import cxcywh_to_xyxy, pairwise_iou
from common.matching import assign_queries, pad_targets
from common.records import Targets

QUALITY_EXPONENT = 0.5  # gamma of the paper's quality; its value could not be checked against the paper's text


def assignment_and_quality(logits: Tensor, boxes_cxcywh: Tensor, targets: list[Targets]) -> tuple[Tensor, Tensor]:
    """The teacher's own assignment (B, L, Q) int64 (-1 for none) and the quality (B, L, Q) of its predictions.

    logits (B, L, Q, K) before the sigmoid, boxes_cxcywh (B, L, Q, 4).
    """
    assignment = assign_queries(logits, boxes_cxcywh, targets)
    return assignment, prediction_quality(logits, boxes_cxcywh, assignment, targets)


def prediction_quality(logits: Tensor, boxes_cxcywh: Tensor, assignment: Tensor, targets: list[Targets]) -> Tensor:
    """quality (B, L, Q) = score^g * IoU^(1-g) in 0..1, 0 for queries without a ground-truth box.

    Score: the sigmoid score of the assigned box's class; IoU: with the assigned box (DETRDistill, arXiv 2211.10156,
    section 3.3, g = .5).
    """
    padded = pad_targets(targets)
    if not padded.labels.shape[1]:
        return logits.new_zeros(assignment.shape)
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
