"""What encoder and decoder share: deformable attention between its projections, and the feed-forward block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.records import LevelShapes
from kernels import deformable_attention, to_device


@dataclass(frozen=True)
class SamplingFrame:
    """Where deformable attention samples: at centre + offset * unit, for every query and level.

    centre: (B, Q, levels, 2) as (x, y) in 0..1 of the padded map. unit: (B or 1, Q or 1, levels, 2), the length of an
    offset of one.
    """

    centre: Tensor
    unit: Tensor


def frame_of_points(points: Tensor, shapes: LevelShapes) -> SamplingFrame:
    """Offsets around points (B, Q, levels, 2) count in cells of the level (arXiv 2010.04159, appendix A.1)."""
    cells = torch.tensor([(width, height) for height, width in shapes], dtype=points.dtype)
    return SamplingFrame(points, to_device(1 / cells, points.device)[None, None])


def frame_of_boxes(boxes_cxcywh: Tensor, points: int) -> SamplingFrame:
    """Offsets in boxes (B, Q, levels, 4) count in half sizes, so that offsets of -`points`..`points` span the box."""
    return SamplingFrame(boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] * (0.5 / points))


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (arXiv 2010.04159, equation 3) with its four projections."""

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head h starts by looking into direction 2 pi h / heads, point k at distance k + 1, all equally weighted."""
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.points + 1)
        bias = directions[:, None, None] * distances[:, None]
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, queries: Tensor, frame: SamplingFrame, tokens: Tensor, token_mask: Tensor, shapes: LevelShapes
    ) -> Tensor:
        """queries (B, Q, C) with positions added, tokens (B, T, C), token_mask (B, T) True where padded; (B, Q, C)."""
        grid = (*queries.shape[:2], self.heads, self.levels, self.points)
        value = self.value_proj(tokens).masked_fill(token_mask[..., None], 0.0)
        offsets = self.sampling_offsets(queries).view(*grid, 2)
        weights = self.attention_weights(queries).view(*grid[:3], -1).softmax(-1).view(grid)
        locations = frame.centre[:, :, None, :, None] + offsets * frame.unit[:, :, None, :, None]
        sampled = deformable_attention(value.unflatten(-1, (self.heads, -1)), shapes, locations, weights)
        projected: Tensor = self.output_proj(sampled)
        return projected


class FeedForward(nn.Module):
    """Linear, ReLU, linear, with dropout after each."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.linear1(x).relu())
        out: Tensor = self.dropout(self.linear2(hidden))
        return out
