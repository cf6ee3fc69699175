"""Feature distillation on cached tokens: `paper` on the encoder's output, `released` on the neck's (its input).

Both are one weighted squared error between the student's features and the teacher's kept tokens. They differ in which
features, in the weight map that phase one computed, and in what the sum is divided by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from common.records import CachedBatch, LevelShapes
from common.resampling import bilinear_corners, match_levels, token_cells, valid_shapes
from kernels import cached_feature_loss, to_device


@dataclass(frozen=True)
class Aligned:
    """The student's features, and which of them each of the teacher's S kept tokens is compared with.

    features: (B, T, C) and offsets: (B + 1,), or (1, S, C) and (2,) where they were interpolated. positions: (S,) int64
    into their T. sample: (S,). level: (S,) of the teacher's levels. cells: (S, 2), row and column in that level. On the
    host: level_matched: (B, levels) bool, False where the student has no level like the teacher's; level_sizes:
    (levels,) float32, tokens of a sample in each of the teacher's levels, padding included.
    """

    features: Tensor
    positions: Tensor
    offsets: Tensor
    sample: Tensor
    level: Tensor
    cells: Tensor
    level_matched: Tensor
    level_sizes: Tensor

    def matched(self) -> Tensor:
        """(S,) bool: which of the teacher's tokens the student learns from."""
        return to_device(self.level_matched, self.sample.device)[self.sample, self.level]

    def rows(self) -> Tensor:
        """(S, C): the student's features, one for each of the teacher's tokens."""
        per_batch = 0 if len(self.features) == 1 else self.sample * self.features.shape[1]
        return self.features.flatten(0, 1).index_select(0, per_batch + self.positions)


def same_levels(cached: CachedBatch, strides: Sequence[int]) -> bool:
    """Whether the student's levels, of these strides, are the teacher's, so that both have the same tokens."""
    if cached.level_strides is None:
        return True
    own = cached.level_strides.new_tensor(strides).unsqueeze(1).expand(-1, 2)
    return cached.level_strides.shape[1:] == own.shape and bool((cached.level_strides == own).all())


def align(
    tokens: Tensor, level_shapes: LevelShapes, token_mask: Tensor, strides: Sequence[int], cached: CachedBatch
) -> Aligned:
    """Find the student's features at the teacher's kept tokens.

    Where both cut samples into the same grids they are the student's own tokens. Otherwise every teacher level is
    matched with the student's level of nearest stride, relative to the sample, and the student's features are
    interpolated at the teacher's token centres.

    tokens: (B, T, C) of the student, in the teacher's width. level_shapes: of the padded batch. token_mask: (B, T) True
    where padded. strides: of the student's levels.
    """
    samples, kept, device = len(cached.token_offsets) - 1, len(cached.token_positions), tokens.device
    offsets, grids = (to_device(values, device) for values in (cached.token_offsets, cached.level_shapes))
    every = torch.arange(samples, device=device)
    sample = torch.repeat_interleave(every, offsets.diff(), output_size=kept)
    level, cells = token_cells(cached.token_positions, sample, grids)
    if same_levels(cached, strides):
        own_shapes = torch.tensor(level_shapes)
        if (cached.level_shapes > own_shapes).any():
            raise ValueError(f"grids {cached.level_shapes.tolist()} do not fit into {level_shapes}")
        sizes = own_shapes.prod(dim=-1)
        starts, widths = to_device(torch.stack((sizes.cumsum(0) - sizes, own_shapes[:, 1])), device)
        positions = starts[level] + cells[:, 0] * widths[level] + cells[:, 1]
        every_level = torch.ones(cached.level_shapes.shape[:2], dtype=torch.bool)
        return Aligned(tokens, positions, offsets, sample, level, cells, every_level, sizes.float())
    assert cached.level_strides is not None
    matched = match_levels(cached.level_strides, strides)  # (B, teacher levels)
    own_level = to_device(matched.clamp(min=0), device)[sample, level]
    centres_px = (cells + 0.5) * to_device(cached.level_strides, device)[sample, level]
    filled = valid_shapes(token_mask, level_shapes)[sample, own_level]
    corners = bilinear_corners(centres_px, own_level, strides, level_shapes, filled)
    interpolated = embedding_bag(
        corners.indices + tokens.shape[1] * sample.unsqueeze(1),
        tokens.flatten(0, 1),
        per_sample_weights=corners.weights.to(tokens.dtype),
        mode="sum",
    )
    return Aligned(
        interpolated.unsqueeze(0),
        torch.arange(kept, device=device),
        to_device(torch.tensor([0, kept]), device),
        sample,
        level,
        cells,
        matched >= 0,
        cached.level_shapes.amax(dim=0).prod(dim=-1).float(),
    )


def feature_loss(student: Aligned, cached: CachedBatch) -> Tensor:
    """`paper`: mean over samples, their own tokens and channels of W(t) (F_T(t) - F_S(t))^2, on the encoder's output.

    W = sum over decoder layers of the squared weight maps (arXiv 2211.10156, section 3.2), computed in phase one. Where
    the cache keeps only some tokens, their weights W / pi make the sum an unbiased estimate of the one over all.
    Tokens of levels that the student has no like of are left out of sum and mean.
    """
    samples, channels = len(cached.level_shapes), student.features.shape[-1]
    counted = (cached.level_shapes.prod(dim=-1) * student.level_matched).sum(dim=1).clamp(min=1)
    scale = student.matched() / (to_device(counted, student.sample.device)[student.sample] * channels * samples)
    return cached_feature_loss(
        rotated(student.features, cached.rotation),
        cached.tokens,
        student.positions,
        cached.token_weights * scale,
        student.offsets,
        scales=cached.token_scales,
        channel_scale=cached.channel_scale,
        channel_shift=cached.channel_shift,
        codebooks=cached.codebooks,
    )


def rotated(features: Tensor, rotation: Tensor | None) -> Tensor:
    """Features (B, T, C) in the space of the teacher's codebooks, where squared errors are the same."""
    return features if rotation is None else features @ rotation.to(features.dtype)


def neck_loss(student: Aligned, cached: CachedBatch) -> Tensor:
    """`released`: sum over feature levels of the mean over the batch, channels and positions, padding included, of
    W(t) (F_T(t) - F_S(t))^2, on the neck's features.

    W: `common.targets.released_token_weights`. Padding counts in the mean, as in the released code; what the teacher
    would have said there is not stored, so it adds nothing to the sum.
    """
    assert cached.neck is not None
    assert cached.neck_weights is not None
    samples, channels = len(cached.level_shapes), student.features.shape[-1]
    level_sizes = to_device(student.level_sizes, student.level.device)
    scale = student.matched() / (level_sizes[student.level] * channels * samples)
    return cached_feature_loss(
        rotated(student.features, cached.neck_rotation),
        cached.neck,
        student.positions,
        cached.neck_weights * scale,
        student.offsets,
        scales=cached.neck_scales,
        channel_scale=cached.neck_channel_scale,
        channel_shift=cached.neck_channel_shift,
        codebooks=cached.neck_codebooks,
    )
