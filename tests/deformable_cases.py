"""Inputs for the tests of deformable attention: odd shapes, places on, at the edge of and far outside the map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of one call."""

    batch: int
    queries: int
    heads: int
    width: int
    levels: tuple[tuple[int, int], ...]
    points: int


SHAPES = {
    "usual": Shape(2, 11, 8, 32, ((8, 7), (4, 4), (2, 2), (1, 1)), 4),
    "odd width": Shape(2, 5, 3, 7, ((4, 5), (2, 3)), 3),
    "one of each": Shape(1, 1, 1, 1, ((1, 1),), 1),
    "wide": Shape(1, 4, 2, 128, ((3, 5),), 2),
    "width between": Shape(3, 6, 2, 20, ((6, 1), (1, 6), (3, 3)), 5),
    "no queries": Shape(2, 0, 2, 8, ((3, 4),), 2),
    "no samples": Shape(0, 5, 2, 8, ((3, 4),), 2),
}


def inputs(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """value, sampling_locations and attention_weights, requiring gradients.

    Each location lies 0.1 to 0.9 of the way between two pixel centres: at a centre itself the gradient jumps, and
    rounding decides on which side a version falls. A fifth of them lie outside the map, some far outside.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(height * width for height, width in shape.levels)
    value = torch.randn(shape.batch, tokens, shape.heads, shape.width, generator=generator, dtype=torch.float64)
    points = (shape.batch, shape.queries, shape.heads, len(shape.levels), shape.points)
    sizes = torch.tensor(shape.levels, dtype=torch.float64).flip(1)[:, None]  # (L, 1, 2) as (width, height)
    uniform = torch.rand(*points, 2, generator=generator, dtype=torch.float64)
    between = 0.1 + 0.8 * torch.rand(*points, 2, generator=generator, dtype=torch.float64)
    pixels = (uniform * (sizes + 3)).floor() - 2 + between  # floor from -2 to size
    locations = (pixels + 0.5) / sizes
    far = torch.rand(points, generator=generator) < 0.05
    locations[far] = locations[far] * 1e6
    weights = torch.rand(points, generator=generator, dtype=torch.float64)
    return (
        value.to(dtype).requires_grad_(),
        locations.to(dtype).requires_grad_(),
        weights.to(dtype).requires_grad_(),
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    if expected.numel() == 0:
        assert found.shape == expected.shape
        return 0.0
    difference = (found.detach().double() - expected.detach().double()).abs().max()
    return float(difference / expected.detach().double().abs().max().clamp_min(1e-30))
