"""Multi-scale deformable attention in plain PyTorch: the truth the other versions are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def deformable_attention_reference(
    value: Tensor, level_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """`deformable_attention` by `grid_sample`, level by level; any device, any floating dtype, differentiable.

    Deformable DETR (arXiv 2010.04159), equation 3. bf16 and fp16 inputs are computed in float32, float64 in float64.
    """
    batch, _, heads, width = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    dtype = torch.promote_types(value.dtype, torch.float32)
    values = (
        value.to(dtype).permute(0, 2, 3, 1).split_with_sizes([h * w for h, w in level_shapes], dim=-1)
    )  # each (B, H, D, h*w)
    grid = (2 * sampling_locations.to(dtype) - 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 1)  # (B*H, L, Q, P, 2)
    sampled = [
        F.grid_sample(
            values[level].reshape(batch * heads, width, *shape),
            grid[:, level],
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        for level, shape in enumerate(level_shapes)
    ]  # each (B*H, D, Q, P)
    weights = attention_weights.to(dtype).transpose(1, 2).reshape(batch * heads, 1, queries, len(level_shapes) * points)
    output = (torch.cat(sampled, dim=-1) * weights).sum(-1)  # (B*H, D, Q)
    return output.view(batch, heads * width, queries).transpose(1, 2).to(value.dtype).contiguous()
