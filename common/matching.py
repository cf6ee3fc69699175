"""Hungarian matching between queries and ground-truth boxes, for the teacher's targets and for the student's losses.

Set prediction (Carion et al., arXiv 2005.12872, eq. 1-2) gives each ground-truth box one query, at the least total
cost. Everything here is batched over samples and decoder layers: boxes are padded to the largest count G of the batch,
and one call solves them all. A matching is written in two ways:

- `matched` (B, L, G) int64: the query of each ground-truth box, -1 where the box is padding or got no query;
- `assignment` (B, L, Q) int64: the ground-truth box of each query, -1 where it got none (what the cache stores).

Both are on the host, which solves the matching, whatever device the predictions are on: so is everything that tells how
many boxes and pairs there are, and no size is ever asked of a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from common.boxes import cxcywh_to_xyxy, pairwise_generalized_iou
from common.records import Targets
from kernels import hungarian, to_device


@dataclass(frozen=True)
class BoxWeights:
    """Weights of the class, L1 and generalized IoU terms, equal in costs and losses (arXiv 2010.04159, section 4)."""

    classes: float = 2.0
    l1: float = 5.0
    giou: float = 2.0


DETECTION_WEIGHTS = BoxWeights()


@dataclass(frozen=True)
class PaddedTargets:
    """Ground truth of a batch, padded to its largest count G.

    boxes_cxcywh: (B, G, 4) float, a harmless box in the middle where padded. labels: (B, G) int64, 0 where padded.
    valid: (B, G) bool, False where padded, on the host.
    """

    boxes_cxcywh: Tensor
    labels: Tensor
    valid: Tensor


class Pairs(NamedTuple):
    """The N pairs of a matching as indices, each (N,) int64: sample, layer, query (row) and box (column)."""

    sample: Tensor
    layer: Tensor
    query: Tensor
    box: Tensor


def pad_targets(targets: list[Targets], device: torch.device) -> PaddedTargets:
    """Pad the ground truth of B samples, which is on the host, to their largest count, which may be 0."""
    counts = torch.tensor([len(target.labels) for target in targets])
    valid = torch.arange(int(counts.max())) < counts[:, None]
    boxes_cxcywh = torch.full((*valid.shape, 4), 0.5)
    labels = torch.zeros(valid.shape, dtype=torch.int64)
    boxes_cxcywh[valid] = torch.cat([target.boxes_cxcywh for target in targets]).float()
    labels[valid] = torch.cat([target.labels for target in targets])
    return PaddedTargets(to_device(boxes_cxcywh, device), to_device(labels, device), valid)


def focal_class_cost(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Cost (..., Q, G) of giving box g's class to query q: the focal loss with that class less the one without it.

    logits: (..., Q, K). labels: (..., G) int64. Focal loss: arXiv 1708.02002, eq. 5; as a cost: arXiv 2010.04159, A.4.
    """
    logits = logits.float()
    probability = logits.sigmoid()
    cost = alpha * (1 - probability) ** gamma * softplus(-logits)
    cost = cost - (1 - alpha) * probability**gamma * softplus(logits)
    return cost.gather(-1, labels.unsqueeze(-2).expand(*logits.shape[:-1], labels.shape[-1]))


def box_cost(boxes_cxcywh: Tensor, target_boxes_cxcywh: Tensor, weights: BoxWeights) -> Tensor:
    """Cost (..., Q, G) of the places alone: weighted L1 of the normalised coordinates less weighted generalized IoU."""
    boxes_cxcywh, target_boxes_cxcywh = boxes_cxcywh.float(), target_boxes_cxcywh.float()
    l1 = torch.cdist(boxes_cxcywh, target_boxes_cxcywh, p=1)
    giou = pairwise_generalized_iou(cxcywh_to_xyxy(boxes_cxcywh), cxcywh_to_xyxy(target_boxes_cxcywh))
    return weights.l1 * l1 - weights.giou * giou


@torch.no_grad()
def detection_cost(
    logits: Tensor, boxes_cxcywh: Tensor, targets: PaddedTargets, weights: BoxWeights = DETECTION_WEIGHTS
) -> Tensor:
    """Cost (B, L, Q, G) of every query of every layer for every ground-truth box: class, L1 and generalized IoU.

    logits: (B, L, Q, K) before the sigmoid. boxes_cxcywh: (B, L, Q, 4) in 0..1. Columns of padding hold finite noise.
    """
    layers = logits.shape[1]
    labels = targets.labels.unsqueeze(1).expand(-1, layers, -1)
    target_boxes_cxcywh = targets.boxes_cxcywh.unsqueeze(1).expand(-1, layers, -1, -1)
    cost = weights.classes * focal_class_cost(logits, labels) + box_cost(boxes_cxcywh, target_boxes_cxcywh, weights)
    return finite_cost(cost)


def finite_cost(cost: Tensor) -> Tensor:
    """A diverged model's NaN and infinite costs made large: it is the loss that reports them, not the matching."""
    return cost.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6)


def assign_queries(
    logits: Tensor, boxes_cxcywh: Tensor, targets: list[Targets], weights: BoxWeights = DETECTION_WEIGHTS
) -> Tensor:
    """The detector's own assignment (B, L, Q): which ground-truth box each query of each layer got, -1 for none.

    logits: (B, L, Q, K) before the sigmoid. boxes_cxcywh: (B, L, Q, 4) in 0..1. A sample without boxes gives -1 only.
    """
    padded = pad_targets(targets, logits.device)
    cost = detection_cost(logits, boxes_cxcywh, padded, weights)
    return boxes_of_queries(hungarian(cost, column_mask=padded.valid.unsqueeze(1)), queries=logits.shape[2])


def boxes_of_queries(matched: Tensor, queries: int) -> Tensor:
    """Turn `matched` (..., G) into `assignment` (..., Q)."""
    assignment = matched.new_full((*matched.shape[:-1], queries + 1), -1)  # the last column swallows unmatched boxes
    boxes = torch.arange(matched.shape[-1], device=matched.device).expand_as(matched)
    assignment.scatter_(-1, matched.where(matched >= 0, queries), boxes)
    return assignment[..., :queries]


def queries_of_boxes(assignment: Tensor, boxes: int) -> Tensor:
    """Turn `assignment` (..., Q) into `matched` (..., G), for G = `boxes`."""
    matched = assignment.new_full((*assignment.shape[:-1], boxes + 1), -1)
    queries = torch.arange(assignment.shape[-1], device=assignment.device).expand_as(assignment)
    matched.scatter_(-1, assignment.where(assignment >= 0, boxes), queries)
    return matched[..., :boxes]


def pairs_of(matched: Tensor, device: torch.device) -> Pairs:
    """The pairs of `matched` (B, L, G), box by box, as indices into (B, L, Q, ...) and (B, L, G, ...) on a device."""
    sample, layer, box = (matched >= 0).nonzero(as_tuple=True)
    return Pairs(*to_device(torch.stack((sample, layer, matched[sample, layer, box], box)), device))
