"""Multi-scale deformable attention: the facade."""

from __future__ import annotations

from torch import Tensor

from kernels.deformable_reference import deformable_attention_reference


def deformable_attention(
    value: Tensor,
    level_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Sample every head's values at a few points of every level and sum them with the attention weights.

    Deformable DETR (arXiv 2010.04159), equation 3, between the projections: for query q and head h
    `output[q, h] = sum over levels l, points p of attention_weights[q, h, l, p] * bilinear(value_l[h], location)`.

    value: (B, T, H, D), the levels one after another, rows before columns. level_shapes: (height, width) of each.
    sampling_locations: (B, Q, H, L, P, 2) as (x, y) relative to each level's width and height; 0..1 is the map,
    (0, 0) the outer corner of its first pixel; what lies outside contributes zero, as in `grid_sample` with
    `padding_mode="zeros", align_corners=False`. attention_weights: (B, Q, H, L, P). Returns (B, Q, H*D) in the dtype of
    value.

    Raises ValueError for shapes that do not fit.
    """
    _check(value, level_shapes, sampling_locations, attention_weights)
    return deformable_attention_reference(value, level_shapes, sampling_locations, attention_weights)


def _check(
    value: Tensor, level_shapes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    if value.dim() != 4:
        raise ValueError(f"value must be (B, T, H, D), got {tuple(value.shape)}")
    tokens = sum(height * width for height, width in level_shapes)
    if value.shape[1] != tokens:
        raise ValueError(f"level_shapes {level_shapes} hold {tokens} tokens, but value has {value.shape[1]}")
    batch, _, heads, _ = value.shape
    shape = sampling_locations.shape
    if len(shape) != 6 or (shape[0], shape[2], shape[3], shape[5]) != (batch, heads, len(level_shapes), 2):
        expected = f"({batch}, Q, {heads}, {len(level_shapes)}, P, 2)"
        raise ValueError(f"sampling_locations must be {expected}, got {tuple(shape)}")
    if attention_weights.shape != shape[:-1]:
        raise ValueError(f"attention_weights must be {tuple(shape[:-1])}, got {tuple(attention_weights.shape)}")
