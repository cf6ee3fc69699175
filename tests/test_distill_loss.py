"""student_train.distill_loss against computations written out sample by sample, with scipy and torchvision."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import generalized_box_iou

from common.boxes import cxcywh_to_xyxy
from common.cache.codec import encode_logits
from common.geometry import token_count
from common.records import CachedBatch
from student_train.distill_loss import at_student_layers, logits_losses, map_layers
from student_train.feature_loss import align, feature_loss

LAYERS, CLASSES, CHANNELS = 2, 5, 8
STUDENT_QUERIES = 12


def draw_boxes(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, 4, generator=generator) * 0.5 + 0.1


def draw_cached(
    counts: list[int], queries: int, layers: int = LAYERS, shapes: list[list[tuple[int, int]]] | None = None
) -> CachedBatch:
    """Records of a teacher that assigned `counts` boxes to queries of its own in every layer; all tokens kept."""
    generator = torch.Generator().manual_seed(7)
    samples = len(counts)
    assignment = torch.full((samples, layers, queries), -1)
    for sample, count in enumerate(counts):
        for layer in range(layers):
            chosen = torch.randperm(queries, generator=generator)[:count]
            assignment[sample, layer, chosen] = torch.randperm(count, generator=generator)[: len(chosen)]
    grids = shapes or [[(4, 3), (2, 2)]] * samples
    sizes = [token_count(grid) for grid in grids]
    return CachedBatch(
        tokens=torch.randn(sum(sizes), CHANNELS, generator=generator).half(),
        token_scales=None,
        channel_scale=None,
        channel_shift=None,
        token_positions=torch.cat([torch.arange(size) for size in sizes]),
        token_weights=torch.rand(sum(sizes), generator=generator),
        token_offsets=torch.tensor([0, *sizes]).cumsum(0),
        level_shapes=torch.tensor(grids),
        queries=torch.randn(samples, layers, queries, CHANNELS, generator=generator),
        logits=torch.randn(samples, layers, queries, CLASSES, generator=generator),
        boxes_cxcywh=draw_boxes(samples, layers, queries, generator=generator),
        quality=torch.rand(samples, layers, queries, generator=generator),
        assignment=assignment,
    )


def loss_of(tokens: Tensor, level_shapes: list[tuple[int, int]], cached: CachedBatch) -> Tensor:
    """`feature_loss` of a student with the teacher's levels."""
    nothing_padded = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    return feature_loss(align(tokens, level_shapes, nothing_padded, (8, 16), cached), cached)


def draw_student(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(samples, LAYERS, STUDENT_QUERIES, CLASSES, generator=generator)
    return logits.requires_grad_(), draw_boxes(samples, LAYERS, STUDENT_QUERIES, generator=generator).requires_grad_()


def box_terms(boxes: Tensor, others: Tensor) -> Tensor:
    """5 L1 + 2 (1 - generalized IoU) of all pairs, by torchvision."""
    l1 = (boxes[:, None] - others[None]).abs().sum(-1)
    return 5 * l1 + 2 * (1 - generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(others)))


def class_terms(logits: Tensor, others: Tensor) -> Tensor:
    """BCE against the sigmoid of the teacher's logits, summed over classes, of all pairs."""
    student, teacher = torch.broadcast_tensors(logits[:, None], others[None].sigmoid())
    return binary_cross_entropy_with_logits(student, teacher, reduction="none").sum(-1)


def expected_losses(logits: Tensor, boxes: Tensor, cached: CachedBatch, mode: str) -> dict[str, Tensor]:
    """The equations sample by sample and layer by layer; the pairs of a layer are counted over the batch."""
    sums = {name: torch.zeros(LAYERS) for name in ("class", "box", "place")}
    counts = {name: torch.zeros(LAYERS) for name in ("class", "box", "place")}
    for sample in range(len(logits)):
        for layer in range(LAYERS):
            x, b = logits[sample, layer], boxes[sample, layer]
            positive = cached.assignment[sample, layer] >= 0
            if mode == "released":
                positive[:] = True
            y, t = cached.logits[sample, layer], cached.boxes_cxcywh[sample, layer]
            if mode == "released":
                xyxy = cxcywh_to_xyxy(t).clamp(0, 1)
                t = torch.cat(((xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]), -1)
            classes, places = class_terms(x, y[positive]), box_terms(b, t[positive])
            rows, columns = linear_sum_assignment((classes + places).detach().numpy())
            sums["class"][layer] += classes[rows, columns].sum()
            sums["box"][layer] += places[rows, columns].sum()
            for name in ("class", "box"):
                counts[name][layer] += len(rows)
            rest = torch.ones(STUDENT_QUERIES, dtype=torch.bool)
            rest[rows] = False
            if mode == "released":
                sums["class"][layer] += binary_cross_entropy_with_logits(
                    x[rest], torch.zeros_like(x[rest]), reduction="sum"
                )
                continue
            places = box_terms(b[rest], t[~positive])
            rows, columns = linear_sum_assignment(places.detach().numpy())
            sums["place"][layer] += places[rows, columns].sum()
            counts["place"][layer] += len(rows)
    names = ("class", "box") if mode == "released" else ("class", "box", "place")
    return {name: (sums[name] / counts[name].clamp(min=1)).sum() for name in names}


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize("teacher_queries", [8, STUDENT_QUERIES, 20])
@pytest.mark.parametrize("counts", [[3, 6], [4, 0], [0, 0]])
def test_logits_losses(mode: str, teacher_queries: int, counts: list[int]) -> None:
    """Each loss and its gradients against the written-out equations, for fewer, as many and more teacher queries than
    the student's, and for empty images: within 1e-5, all finite."""
    cached = draw_cached(counts, teacher_queries)
    logits, boxes = draw_student(len(counts))
    found = logits_losses(logits, boxes, cached, max(counts), mode)  # type: ignore[arg-type]
    expected = expected_losses(logits, boxes, cached, mode)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(sum(found.values()), (logits, boxes), allow_unused=True)
    expected_gradients = torch.autograd.grad(sum(expected.values()), (logits, boxes), allow_unused=True)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        if expected_gradient is None:  # no positives at all: nothing says anything about classes
            assert gradient is None or gradient.abs().sum() == 0
        else:
            assert gradient is not None
            torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)


def test_positives_and_negatives_share_no_student_query() -> None:
    """A student that predicts exactly what the teacher does, in another order, has a place loss of 0 and no box loss.

    Only true if positives and negatives each find their own copy: 1e-5.
    """
    cached = draw_cached([3, 5], STUDENT_QUERIES)
    order = torch.randperm(STUDENT_QUERIES, generator=torch.Generator().manual_seed(1))
    # Boxes alone do not tell queries apart if two coincide; drawn ones do not.
    losses = logits_losses(cached.logits[:, :, order], cached.boxes_cxcywh[:, :, order], cached, 5, "paper")
    assert losses["box"] < 1e-5
    assert losses["place"] < 1e-5


def test_layers_are_mapped_by_relative_depth() -> None:
    """The last layer to the last, equal counts one to one, and the order kept, for every pair of counts up to 8."""
    for student in range(1, 9):
        assert map_layers(student, student) == list(range(student))
        for teacher in range(1, 9):
            mapped = map_layers(student, teacher)
            assert mapped[-1] == teacher - 1
            assert mapped == sorted(mapped)
            assert min(mapped) >= 0
    assert map_layers(3, 6) == [1, 3, 5]
    cached = at_student_layers(draw_cached([2, 1], 8, layers=6), 3)
    torch.testing.assert_close(cached.logits, draw_cached([2, 1], 8, layers=6).logits[:, [1, 3, 5]], atol=0, rtol=0)


def test_logits_stored_as_codes_are_decoded() -> None:
    """The losses of a batch whose logits are one byte each, as from a store, against those with the logits that these
    bytes stand for: equal to 1e-6; and within 1% of those with the exact logits."""
    exact = draw_cached([2, 1], 8)
    codes = torch.from_numpy(encode_logits(exact.logits.numpy()))
    found = at_student_layers(replace(exact, logits=codes), LAYERS)
    angle = codes.double().clamp(0.25, 254.75) * math.pi / 510
    expected = at_student_layers(replace(exact, logits=(2 * angle.tan().log()).float()), LAYERS)
    logits, boxes = draw_student(2)
    of_codes, of_floats, of_exact = (
        logits_losses(logits, boxes, cached, 2, "paper")
        for cached in (found, expected, at_student_layers(exact, LAYERS))
    )
    for name, loss in of_codes.items():
        torch.testing.assert_close(loss, of_floats[name], rtol=1e-6, atol=0)
        torch.testing.assert_close(loss, of_exact[name], rtol=0.01, atol=0)


def test_feature_loss_is_the_weighted_mean_over_the_samples_own_tokens() -> None:
    """Two samples of unequal size in a padded batch, against a loop over tokens in float64: within 1e-6 relative.

    The padding's features are 1e3: were one of them read, the loss would be far off.
    """
    shapes = [[(4, 3), (2, 2)], [(2, 5), (1, 3)]]
    batch_shapes = [(4, 5), (2, 3)]
    cached = draw_cached([1, 1], 4, shapes=shapes)
    generator = torch.Generator().manual_seed(5)
    levels = [torch.full((2, *shape, CHANNELS), 1e3) for shape in batch_shapes]
    expected = torch.zeros((), dtype=torch.float64)
    start = 0
    for sample, grid in enumerate(shapes):
        for level, (height, width) in enumerate(grid):
            student = torch.randn(height, width, CHANNELS, generator=generator)
            levels[level][sample, :height, :width] = student
            teacher = cached.tokens[start : start + height * width].double().view(height, width, CHANNELS)
            weights = cached.token_weights[start : start + height * width].double().view(height, width)
            error = (weights[..., None] * (teacher - student.double()) ** 2).sum()
            expected += error / (token_count(grid) * CHANNELS * len(shapes))
            start += height * width
    tokens = torch.cat([level.flatten(1, 2) for level in levels], dim=1)
    torch.testing.assert_close(loss_of(tokens, batch_shapes, cached).double(), expected, atol=0, rtol=1e-6)


def test_kept_tokens_estimate_the_loss_over_all() -> None:
    """Every token once in one of four samplings of a quarter, each with its weight times four: their mean is the dense
    loss, within 1e-6 relative."""
    cached = draw_cached([1], 4, shapes=[[(6, 4), (3, 4)]])
    tokens = torch.randn(1, 36, CHANNELS, generator=torch.Generator().manual_seed(2))
    dense = loss_of(tokens, [(6, 4), (3, 4)], cached)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(4)).view(4, 9)
    estimates = [
        loss_of(
            tokens,
            [(6, 4), (3, 4)],
            replace(
                cached,
                tokens=cached.tokens[kept],
                token_positions=kept,
                token_weights=4 * cached.token_weights[kept],
                token_offsets=torch.tensor([0, 9]),
            ),
        )
        for kept in order
    ]
    torch.testing.assert_close(torch.stack(estimates).mean(), dense, atol=0, rtol=1e-6)
