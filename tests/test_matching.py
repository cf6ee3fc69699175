"""common.matching against scipy's solver and the written-out formula of the costs."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import generalized_box_iou

from common.boxes import cxcywh_to_xyxy
from common.matching import (
    BoxWeights,
    assign_queries,
    boxes_of_queries,
    detection_cost,
    pad_targets,
    pairs_of,
    queries_of_boxes,
)
from common.records import Targets

LAYERS, QUERIES, CLASSES = 3, 12, 5


def draw(counts: list[int], seed: int = 0) -> tuple[Tensor, Tensor, list[Targets]]:
    """Logits and boxes of three layers, and ground truth with the given numbers of boxes."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(counts), LAYERS, QUERIES, CLASSES, generator=generator)
    boxes_cxcywh = torch.rand(len(counts), LAYERS, QUERIES, 4, generator=generator) * 0.5 + 0.1
    targets = [
        Targets(
            torch.rand(count, 4, generator=generator) * 0.5 + 0.1,
            torch.randint(CLASSES, (count,), generator=generator),
        )
        for count in counts
    ]
    return logits, boxes_cxcywh, targets


def cost_by_formula(logits: Tensor, boxes_cxcywh: Tensor, target: Targets, weights: BoxWeights) -> Tensor:
    """(Q, G) of one sample and layer, from logarithms and torchvision's generalized IoU, in float64."""
    p = logits.double().sigmoid()
    with_class, without = -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()
    boxes, truth = boxes_cxcywh.double(), target.boxes_cxcywh.double()
    l1 = (boxes[:, None] - truth[None]).abs().sum(-1)
    giou = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth))
    return weights.classes * (with_class - without)[:, target.labels] + weights.l1 * l1 - weights.giou * giou


@pytest.mark.parametrize("counts", [[4, 1, 7], [3, 0], [0, 0], [1], [20, 2]])
def test_assignment_is_scipys_optimum_in_every_layer(counts: list[int]) -> None:
    """Each sample's and layer's assignment against scipy's on the cost by formula: equal (costs within 1e-5).

    Counts include samples without boxes, and one with more boxes than queries.
    """
    logits, boxes_cxcywh, targets = draw(counts)
    cost = detection_cost(logits, boxes_cxcywh, pad_targets(targets, torch.device("cpu")))
    assignment = assign_queries(logits, boxes_cxcywh, targets)
    for sample, target in enumerate(targets):
        for layer in range(LAYERS):
            expected_cost = cost_by_formula(logits[sample, layer], boxes_cxcywh[sample, layer], target, BoxWeights())
            found = cost[sample, layer, :, : counts[sample]].double()
            torch.testing.assert_close(found, expected_cost, atol=1e-5, rtol=0)
            expected = torch.full((QUERIES,), -1)
            queries, boxes = linear_sum_assignment(expected_cost.numpy())
            expected[queries] = torch.from_numpy(boxes)
            assert torch.equal(assignment[sample, layer], expected)


def test_both_ways_of_writing_a_matching_hold_the_same_pairs() -> None:
    """queries_of_boxes and boxes_of_queries undo each other, and pairs_of lists exactly their pairs."""
    logits, boxes_cxcywh, targets = draw([4, 0, 7])
    assignment = assign_queries(logits, boxes_cxcywh, targets)
    matched = queries_of_boxes(assignment, boxes=7)
    assert torch.equal(boxes_of_queries(matched, QUERIES), assignment)
    pairs = pairs_of(matched, matched.device)
    assert len(pairs.query) == LAYERS * 11
    assert torch.equal(assignment[pairs.sample, pairs.layer, pairs.query], pairs.box)


def test_not_a_number_is_left_for_the_loss_to_report() -> None:
    """A diverged model's NaN and infinite predictions get some matching, each box one query, instead of an error."""
    logits, boxes_cxcywh, targets = draw([3, 2])
    logits[0, 0, 0] = float("nan")
    boxes_cxcywh[1, 2] = float("inf")
    assignment = assign_queries(logits, boxes_cxcywh, targets)
    assert ((assignment >= 0).sum(-1) == torch.tensor([3, 2])[:, None]).all()
