"""Where a teacher's tokens lie on a student's feature maps, when the two cut the same sample into different grids.

A feature grid of stride s has its cell (i, j) centred at pixel ((i + 1/2) s, (j + 1/2) s). A teacher that resized the
sample to its own input has tokens at other strides than its own, and other down than across. Levels belong together
when their strides, in pixels of the sample, are nearest; the student's features at a teacher's token are interpolated
between the four cells around its centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.records import LevelShapes
from kernels import to_device

MATCH_OCTAVES = 0.5  # levels whose strides differ by more than a factor of 2^0.5 see other things


@dataclass(frozen=True)
class TokenPlaces:
    """Where S tokens are. level: (S,) int64. centres_px: (S, 2), y and x in pixels of the sample."""

    level: Tensor
    centres_px: Tensor


@dataclass(frozen=True)
class Corners:
    """Bilinear interpolation in flattened tokens: indices (S, 4) int64 into T, and weights (S, 4) that sum to 1."""

    indices: Tensor
    weights: Tensor


def match_levels(teacher_strides: Tensor, student_strides: Sequence[float]) -> Tensor:
    """The student level that is nearest to each teacher level by stride, -1 where none is within MATCH_OCTAVES.

    teacher_strides: (..., levels, 2), pixels of the sample from token to token, down and across, of which the geometric
    mean counts. Returns (..., levels) int64.
    """
    octaves = teacher_strides.double().log2().mean(dim=-1, keepdim=True)
    own = torch.tensor(list(student_strides), dtype=torch.float64, device=octaves.device).log2()
    distance, nearest = (octaves - own).abs().min(dim=-1)
    return nearest.where(distance <= MATCH_OCTAVES + 1e-9, -1)


def token_cells(positions: Tensor, samples: Tensor, level_shapes: Tensor) -> tuple[Tensor, Tensor]:
    """Level (S,) and cell (S, 2), row and column, of tokens given as positions (S,) in the T of their samples (S,).

    level_shapes: (B, levels, 2) int64.
    """
    ends = level_shapes.prod(dim=-1).cumsum(dim=-1)  # (B, levels)
    level = (positions.unsqueeze(1) >= ends[samples]).sum(dim=1)
    within = positions - (ends - level_shapes.prod(dim=-1))[samples, level]
    width = level_shapes[samples, level, 1]
    return level, torch.stack((within.div(width, rounding_mode="floor"), within % width), dim=-1)


def token_places(positions: Tensor, samples: Tensor, level_shapes: Tensor, level_strides: Tensor) -> TokenPlaces:
    """Level and centre of tokens, given as positions (S,) in the T of their samples (S,).

    level_shapes: (B, levels, 2) int64. level_strides: (B, levels, 2) float, pixels of the sample from token to token.
    """
    level, cells = token_cells(positions, samples, level_shapes)
    return TokenPlaces(level, (cells + 0.5) * level_strides[samples, level])


def bilinear_corners(
    centres_px: Tensor, levels: Tensor, strides: Sequence[float], batch_shapes: LevelShapes, valid_shapes: Tensor
) -> Corners:
    """The four cells around points centres_px (S, 2) on levels (S,), and their shares.

    batch_shapes: of the padded batch, whose flattened tokens the indices point into. valid_shapes: (S, 2) int64, rows
    and columns of the point's level that its sample fills: beyond the outermost centres the nearest is taken, so that
    no padding is mixed in.
    """
    device = centres_px.device
    shapes = to_device(torch.tensor(batch_shapes), device)
    starts = torch.cat((shapes.new_zeros(1), shapes.prod(dim=1).cumsum(0)[:-1]))
    stride = to_device(torch.tensor(list(strides), dtype=centres_px.dtype), device)[levels].unsqueeze(1)
    last = valid_shapes - 1
    cells = (centres_px / stride - 0.5).clamp(min=0).minimum(last.to(centres_px.dtype))
    low = cells.floor().long()
    high = (low + 1).minimum(last)
    share = cells - low
    rows = torch.stack((low[:, 0], low[:, 0], high[:, 0], high[:, 0]), dim=1)
    columns = torch.stack((low[:, 1], high[:, 1], low[:, 1], high[:, 1]), dim=1)
    down, across = share[:, :1], share[:, 1:]
    weights = torch.cat(
        ((1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across),
        dim=1,
    )
    return Corners(starts[levels].unsqueeze(1) + rows * shapes[levels, 1].unsqueeze(1) + columns, weights)


def valid_shapes(token_mask: Tensor, batch_shapes: LevelShapes) -> Tensor:
    """Rows and columns of each level that each sample fills, (B, levels, 2), from a mask (B, T) True where padded."""
    sizes = [height * width for height, width in batch_shapes]
    valid = torch.split(~token_mask, sizes, dim=1)  # type: ignore[no-untyped-call]
    grids = [level.reshape(-1, *shape) for level, shape in zip(valid, batch_shapes, strict=True)]
    return torch.stack([torch.stack((grid[:, :, 0].sum(1), grid[:, 0].sum(1)), dim=1) for grid in grids], dim=1)
