"""Hungarian-matching logits distillation of DETRDistill (arXiv 2211.10156), a pure function of output and cache.

Two modes: `paper` follows the article, `released` the authors' published code; they differ in what is matched with
what. A teacher's decoder layers are first mapped to the student's (`map_layers`), so that L below is the student's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from common.boxes import clip, cxcywh_to_xyxy, xyxy_to_cxcywh
from common.cache.codec import decode_logits
from common.devices import mean_over_ranks
from common.matching import BoxWeights, box_cost, finite_cost, pairs_of, queries_of_boxes
from common.records import CachedBatch
from kernels import hungarian, hungarian_start, to_device
from student_train.set_loss import box_losses, queries_at
from student_train.step_counts import StepCounts

SOFT_WEIGHTS = BoxWeights(classes=1.0, l1=5.0, giou=2.0)  # the released configuration; the article names none


@dataclass(frozen=True)
class TeacherQueries:
    """Some of the teacher's predictions, as the columns N of a matching.

    logits: (B, L, N, K) before the sigmoid. boxes_cxcywh: (B, L, N, 4). valid: (B, L, N) bool on the host, False where
    padded. index: (B, L, N) int64, which of the teacher's Q queries each is.
    """

    logits: Tensor
    boxes_cxcywh: Tensor
    valid: Tensor
    index: Tensor


def map_layers(student_layers: int, teacher_layers: int) -> list[int]:
    """The teacher layer that supervises each student layer: the one at the same relative depth, last to last."""
    return [max(0, round((layer + 1) * teacher_layers / student_layers) - 1) for layer in range(student_layers)]


def at_student_layers(cached: CachedBatch, layers: int) -> CachedBatch:
    """The cached predictions with one decoder layer for each of the student's `layers`, logits decoded."""
    cached = replace(cached, logits=decode_logits(cached.logits))
    if cached.logits.shape[1] == layers:
        return cached
    chosen = map_layers(layers, cached.logits.shape[1])
    names = ("queries", "logits", "boxes_cxcywh", "quality", "assignment")
    return replace(
        cached, **{name: torch.stack([getattr(cached, name)[:, layer] for layer in chosen], 1) for name in names}
    )


# Which of the teacher's queries are distilled ------------------------------------------------------------------------


def positive_queries(cached: CachedBatch, boxes: int) -> TeacherQueries:
    """`paper`: the queries that the teacher's own matching gave a box, one column for each of G = `boxes`."""
    matched = queries_of_boxes(cached.assignment, boxes)
    index, valid = to_device(matched.clamp(min=0), cached.logits.device), matched >= 0
    return TeacherQueries(_gather(cached.logits, index), _gather(cached.boxes_cxcywh, index), valid, index)


def negative_queries(cached: CachedBatch) -> TeacherQueries:
    """`paper`: the other queries, in columns of all Q."""
    return TeacherQueries(cached.logits, cached.boxes_cxcywh.float(), cached.assignment < 0, _own_index(cached))


def all_queries(cached: CachedBatch) -> TeacherQueries:
    """`released`: every query of the teacher, its box cut at the borders of the image."""
    boxes_cxcywh = xyxy_to_cxcywh(clip(cxcywh_to_xyxy(cached.boxes_cxcywh.float()), 1.0, 1.0))
    valid = torch.ones_like(cached.assignment, dtype=torch.bool)
    return TeacherQueries(cached.logits, boxes_cxcywh, valid, _own_index(cached))


def _own_index(cached: CachedBatch) -> Tensor:
    queries = cached.assignment.shape[2]
    return torch.arange(queries, device=cached.logits.device).expand(cached.assignment.shape)


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """Rows (B, L, N, ...) of values (B, L, Q, ...) at index (B, L, N)."""
    index = index.unsqueeze(-1).expand(*index.shape, values.shape[-1])
    return values.gather(2, index).float()


# Their matching with the student's queries ---------------------------------------------------------------------------


@torch.no_grad()
def soft_cost(
    logits: Tensor, boxes_cxcywh: Tensor, teacher: TeacherQueries, weights: BoxWeights = SOFT_WEIGHTS
) -> Tensor:
    """Cost (B, L, Q, N) of class, L1 and generalized IoU between student queries and teacher queries.

    The class cost is the loss itself, summed over classes: sum_k BCE(x_k, p_k) = sum_k softplus(x_k) - x_k p_k.
    """
    logits = logits.float()
    classes = softplus(logits).sum(dim=-1, keepdim=True) - logits @ teacher.logits.float().sigmoid().transpose(-1, -2)
    return finite_cost(weights.classes * classes + box_cost(boxes_cxcywh, teacher.boxes_cxcywh, weights))


@torch.no_grad()
def place_cost(boxes_cxcywh: Tensor, teacher: TeacherQueries, weights: BoxWeights = SOFT_WEIGHTS) -> Tensor:
    """Cost (B, L, Q, N) of the boxes alone."""
    return finite_cost(box_cost(boxes_cxcywh, teacher.boxes_cxcywh, weights))


def unmatched_queries(matched: Tensor, queries: int) -> Tensor:
    """Which student queries (B, L, Q) a matching (B, L, N) left over."""
    free = torch.ones(*matched.shape[:-1], queries + 1, dtype=torch.bool, device=matched.device)
    return free.scatter_(-1, matched.where(matched >= 0, queries), False)[..., :queries]


def pair_counts(matched: Tensor, device: torch.device) -> Tensor:
    """Pairs (L,) of each decoder layer in the batch of a rank, on average over ranks, and at least 1."""
    return mean_over_ranks(to_device((matched >= 0).sum(dim=(0, 2)).float(), device)).clamp(min=1)


def match_queries(
    logits: Tensor, boxes_cxcywh: Tensor, cached: CachedBatch, boxes: int, mode: Literal["paper", "released"]
) -> tuple[TeacherQueries, Tensor]:
    """The teacher's queries that are distilled in class and box, and the student's query (B, L, N) of each, or -1,
    on the host.

    `paper`: those that have a ground-truth box. `released`: all. Arguments as in `logits_losses`.
    """
    teacher = positive_queries(cached, boxes) if mode == "paper" else all_queries(cached)
    return teacher, hungarian(soft_cost(logits, boxes_cxcywh, teacher), column_mask=teacher.valid)


# The losses ----------------------------------------------------------------------------------------------------------


def logits_losses(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    cached: CachedBatch,
    boxes: int,
    mode: Literal["paper", "released"],
    step: StepCounts | None = None,
    found: tuple[TeacherQueries, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Hungarian-matching logits distillation (arXiv 2211.10156, section 3.1): `class`, `box` and, in `paper`, `place`.

    paper: the teacher's positive queries are matched with the student's by class, L1 and generalized IoU, and
    distilled in class (`class`) and box (`box`); its negative ones are matched with the student's remaining queries by
    box alone, and distilled in box (`place`: the negative location). released: all of the teacher's queries are
    treated like positives.

    logits: (B, L, Q, K) before the sigmoid. boxes_cxcywh: (B, L, Q, 4) in 0..1. cached: at the student's L layers,
    with any number of queries. boxes: the largest count of ground-truth boxes, which may be 0. Each term is summed
    over layers, within a layer divided by its number of pairs: the step's where `step` is given, else the batch's.
    found: of `match_queries`, where it is known already.
    """
    teacher, matched = found or match_queries(logits, boxes_cxcywh, cached, boxes, mode)
    if mode == "paper":
        negatives = negative_queries(cached)
        matching = hungarian_start(
            place_cost(boxes_cxcywh, negatives), unmatched_queries(matched, logits.shape[2]), negatives.valid
        )
    if step is None:
        counts = pair_counts(matched, logits.device)
    else:
        counts = (step.positives if mode == "paper" else step.pairs).expand(logits.shape[1])
    losses = {
        "class": soft_class_loss(logits, teacher, matched, counts, unmatched_are_empty=mode == "released"),
        "box": soft_box_loss(boxes_cxcywh, teacher, matched, counts),
    }
    if mode == "paper":
        matched = matching.result()
        counts = pair_counts(matched, logits.device) if step is None else step.negatives.expand(logits.shape[1])
        losses["place"] = soft_box_loss(boxes_cxcywh, negatives, matched, counts)
    return losses


def soft_class_loss(
    logits: Tensor, teacher: TeacherQueries, matched: Tensor, counts: Tensor, unmatched_are_empty: bool = False
) -> Tensor:
    """Class distillation: sum over layers and pairs of sum_k BCE(student logit, sigmoid(teacher logit)) / counts.

    logits: (B, L, Q, K) before the sigmoid. matched: (B, L, N), the student query of each teacher query, -1 for none.
    counts: of `pair_counts`; this is the released code's reduction, the article leaves it open.
    `unmatched_are_empty` (`released`): student queries without a partner are taught score 0 in every class.
    """
    logits = logits.float()
    pairs = pairs_of(matched, logits.device)
    scores = teacher.logits[pairs.sample, pairs.layer, pairs.box].float().sigmoid()
    cross_entropy = binary_cross_entropy_with_logits(queries_at(logits, pairs), scores, reduction="none").sum(dim=-1)
    loss = (cross_entropy / counts[pairs.layer]).sum()
    if unmatched_are_empty:
        free = to_device(unmatched_queries(matched, logits.shape[2]), logits.device)
        loss = loss + (softplus(logits).sum(dim=-1) * free / counts[:, None]).sum()
    return loss


def soft_box_loss(
    boxes_cxcywh: Tensor, teacher: TeacherQueries, matched: Tensor, counts: Tensor, weights: BoxWeights = SOFT_WEIGHTS
) -> Tensor:
    """Place distillation: sum over layers and pairs of (w_l1 |b - b_T|_1 + w_giou (1 - GIoU(b, b_T))) / counts(layer).

    boxes_cxcywh: (B, L, Q, 4) in 0..1. matched and counts as in `soft_class_loss`.
    """
    pairs = pairs_of(matched, boxes_cxcywh.device)
    target_boxes_cxcywh = teacher.boxes_cxcywh[pairs.sample, pairs.layer, pairs.box]
    l1, giou = box_losses(queries_at(boxes_cxcywh.float(), pairs), target_boxes_cxcywh)
    return ((weights.l1 * l1 + weights.giou * giou) / counts[pairs.layer]).sum()
