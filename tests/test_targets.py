"""common.targets: the weight maps against their formulas written out query by query and layer by layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchvision.ops import box_convert, box_iou

from common.geometry import token_count
from common.targets import released_token_weights, token_weights

LAYERS, QUERIES, CLASSES, CHANNELS = 3, 30, 5, 8
SHAPES = [(5, 4), (3, 2), (2, 1)]


def drawn(boxes: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """queries, features, logits, boxes_cxcywh and target_boxes_cxcywh of one sample."""
    generator = torch.Generator().manual_seed(boxes)
    queries = torch.randn(LAYERS, QUERIES, CHANNELS, generator=generator)
    features = torch.randn(token_count(SHAPES), CHANNELS, generator=generator)
    logits = torch.randn(LAYERS, QUERIES, CLASSES, generator=generator)
    boxes_cxcywh = torch.rand(LAYERS, QUERIES, 4, generator=generator) * 0.5 + 0.1
    return queries, features, logits, boxes_cxcywh, torch.rand(boxes, 4, generator=generator) * 0.5 + 0.1


def released_masks(
    queries: Tensor, features: Tensor, logits: Tensor, boxes_cxcywh: Tensor, target_boxes_cxcywh: Tensor
) -> list[list[Tensor]]:
    """The mask (h, w) of each level of each layer, one prediction after another."""
    layers = []
    for layer in range(LAYERS):
        predictions = [
            (float(logits[layer, query, label].sigmoid()), query)
            for query in range(QUERIES)
            for label in range(CLASSES)
        ]
        best = sorted(predictions, reverse=True)[:100]
        levels, start = [], 0
        for height, width in SHAPES:
            mask = torch.zeros(height, width, dtype=torch.float64)
            for score, query in best:
                weight = score
                if len(target_boxes_cxcywh):
                    own, theirs = (
                        box_convert(b.double(), "cxcywh", "xyxy")
                        for b in (boxes_cxcywh[layer, query, None], target_boxes_cxcywh)
                    )
                    weight *= float(box_iou(own, theirs).max())
                for y in range(height):
                    for x in range(width):
                        token = features[start + y * width + x].double()
                        mask[y, x] += weight * cosine_similarity(queries[layer, query].double(), token, dim=0)
            mask = mask.clamp(min=0.01)
            levels.append(mask / mask.max())
            start += height * width
        layers.append(levels)
    return layers


@pytest.mark.parametrize("boxes", [3, 0])
def test_released_weights_and_that_one_map_is_enough(boxes: int) -> None:
    """The map against the sum of squared masks, and the loss it gives against the released one summed over layers and
    levels, mean((mask (F_T - F_S))^2) each, with boxes and without: relative 1e-5."""
    sample = drawn(boxes)
    weights = released_token_weights(*sample, SHAPES)
    layers = released_masks(*sample)
    expected = sum(torch.cat([mask.flatten() for mask in levels]).square() for levels in layers)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-9)
    assert len(torch.unique(weights)) > 5

    student = torch.randn(sample[1].shape, generator=torch.Generator().manual_seed(9)).double()
    difference = (sample[1].double() - student).split([height * width for height, width in SHAPES])
    as_released, by_map = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    start = 0
    for level, (height, width) in enumerate(SHAPES):
        grid = difference[level].view(height, width, CHANNELS)
        for levels in layers:
            as_released += (levels[level][..., None] * grid).square().mean()
        own = weights[start : start + height * width].double()
        by_map += (own[:, None] * difference[level].square()).sum() / (height * width * CHANNELS)
        start += height * width
    torch.testing.assert_close(by_map, as_released, rtol=1e-5, atol=0)


def test_paper_weights_are_the_sum_of_squared_masks() -> None:
    """m_i(t) = sum_n quality_i(n) cos(query_i(n), F_T(t)), query by query in float64: relative 1e-5."""
    queries, features, *_ = drawn(2)
    quality = torch.rand(LAYERS, QUERIES, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros(len(features), dtype=torch.float64)
    for layer in range(LAYERS):
        mask = torch.zeros(len(features), dtype=torch.float64)
        for query in range(QUERIES):
            similarity = cosine_similarity(queries[layer, query, None].double(), features.double(), dim=1)
            mask += float(quality[layer, query]) * similarity
        expected += mask.square()
    torch.testing.assert_close(token_weights(queries, features, quality).double(), expected, rtol=1e-5, atol=1e-9)
