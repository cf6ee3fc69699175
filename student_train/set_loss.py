"""The detection loss: set prediction with the focal, L1 and generalized IoU losses, summed over decoder layers.

Deformable DETR, arXiv 2010.04159, section 4 and appendix A.4; the two-stage proposals: its section 4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from common.boxes import cxcywh_to_xyxy, generalized_iou
from common.matching import DETECTION_WEIGHTS, BoxWeights, PaddedTargets, Pairs, detection_cost, pairs_of
from kernels import hungarian


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t) of each element (arXiv 1708.02002, eq. 5).

    logits: any shape, before the sigmoid. targets: the same shape, 0 or 1.
    """
    probability = logits.sigmoid()
    cross_entropy = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    miss = probability + targets - 2 * probability * targets  # 1 - p_t
    return (1 - alpha + (2 * alpha - 1) * targets) * miss**gamma * cross_entropy


def box_losses(boxes_cxcywh: Tensor, target_boxes_cxcywh: Tensor) -> tuple[Tensor, Tensor]:
    """L1 of the four normalised coordinates, and 1 - generalized IoU, each (N,), of boxes (N, 4) and (N, 4)."""
    l1 = (boxes_cxcywh - target_boxes_cxcywh).abs().sum(dim=-1)
    return l1, 1 - generalized_iou(cxcywh_to_xyxy(boxes_cxcywh), cxcywh_to_xyxy(target_boxes_cxcywh))


def set_loss(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    targets: PaddedTargets,
    matched: Tensor,
    box_count: Tensor | float,
    weights: BoxWeights = DETECTION_WEIGHTS,
) -> dict[str, Tensor]:
    """The weighted detection losses `class`, `l1` and `giou`, each a scalar summed over samples and layers.

    sum over layers of [w_class sum FL(logits, one-hot of matched queries)
                        + w_l1 sum |b - b*|_1 + w_giou sum (1 - GIoU(b, b*))] / box_count.

    logits: (B, L, Q, K) before the sigmoid. boxes_cxcywh: (B, L, Q, 4) in 0..1. matched: (B, L, G) on the host, of
    any matching: the student's own, or the teacher's for the teacher's queries. box_count: ground-truth boxes of a rank
    on average, at least 1. Queries without a box are taught that no class is there; samples without boxes give that
    part alone.
    """
    pairs = pairs_of(matched, logits.device)
    logits, boxes_cxcywh = logits.float(), boxes_cxcywh.float()
    one_hot = torch.zeros_like(logits)
    one_hot[pairs.sample, pairs.layer, pairs.query, targets.labels[pairs.sample, pairs.box]] = 1
    l1, giou = box_losses(queries_at(boxes_cxcywh, pairs), targets.boxes_cxcywh[pairs.sample, pairs.box])
    return {
        "class": weights.classes * focal_loss(logits, one_hot).sum() / box_count,
        "l1": weights.l1 * l1.sum() / box_count,
        "giou": weights.giou * giou.sum() / box_count,
    }


def proposal_losses(
    logits: Tensor, boxes_cxcywh: Tensor, token_mask: Tensor, targets: PaddedTargets, box_count: Tensor | float
) -> dict[str, Tensor]:
    """The detection losses of two-stage proposals, which learn objectness: every box has class 0.

    logits: (B, T, K) and boxes_cxcywh: (B, T, 4), the encoder's prediction at each token. token_mask: (B, T) True where
    padded: those tokens take no part, in the matching or in the loss, so that padding changes nothing.
    """
    logits = logits.masked_fill(token_mask.unsqueeze(-1), -1e4).unsqueeze(1)  # a loss of exactly 0
    boxes_cxcywh = boxes_cxcywh.unsqueeze(1)
    objects = PaddedTargets(targets.boxes_cxcywh, torch.zeros_like(targets.labels), targets.valid)
    cost = detection_cost(logits, boxes_cxcywh, objects)
    matched = hungarian(cost, ~token_mask.unsqueeze(1), objects.valid.unsqueeze(1))
    return set_loss(logits, boxes_cxcywh, objects, matched, box_count)


def queries_at(values: Tensor, pairs: Pairs) -> Tensor:
    """The rows (N, ...) of per-query values (B, L, Q, ...) that the pairs name."""
    return values[pairs.sample, pairs.layer, pairs.query]
