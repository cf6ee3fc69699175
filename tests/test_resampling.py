"""A teacher's grids against a student's: the arithmetic, and the feature loss that is built on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor
from torch.nn.functional import grid_sample

from common.geometry import level_shapes
from common.records import CachedBatch, LevelShapes
from common.resampling import bilinear_corners, match_levels, token_places, valid_shapes
from student_train.feature_loss import align, feature_loss, same_levels

STRIDES = (8, 16, 32, 64)
SIZES = ((200, 333), (416, 250), (320, 320))  # height and width of three samples, padded to a common multiple of 64
TEACHER_SIZE, TEACHER_STRIDES = (320, 320), (8, 16, 32)


def padded(sizes: tuple[tuple[int, int], ...] = SIZES) -> tuple[LevelShapes, Tensor]:
    """The padded batch's grids and its token mask."""
    height, width = (-(-max(size[axis] for size in sizes) // 64) * 64 for axis in (0, 1))
    shapes = level_shapes(height, width, STRIDES)
    masks = []
    for size in sizes:
        mask = torch.ones(height, width, dtype=torch.bool)
        mask[: size[0], : size[1]] = False
        masks.append(torch.cat([mask[::stride, ::stride].flatten() for stride in STRIDES]))
    return shapes, torch.stack(masks)


def teacher_grids(resizes: bool) -> tuple[Tensor, Tensor]:
    """level_shapes and level_strides of the three samples, of a teacher that resizes them or that does not."""
    shapes, strides = [], []
    for height, width in SIZES:
        seen = TEACHER_SIZE if resizes else (height, width)
        shapes.append(level_shapes(*seen, TEACHER_STRIDES))
        strides.append([(s * height / seen[0], s * width / seen[1]) for s in TEACHER_STRIDES])
    return torch.tensor(shapes), torch.tensor(strides, dtype=torch.float32)


def make_cached(resizes: bool, channels: int, seed: int = 0) -> CachedBatch:
    """Random teacher tokens of the three samples, of which some are kept."""
    generator = torch.Generator().manual_seed(seed)
    shapes, strides = teacher_grids(resizes)
    counts = shapes.prod(-1).sum(-1).tolist()
    kept = [torch.randperm(count, generator=generator)[: count // 12].sort().values for count in counts]
    offsets = torch.tensor([0, *(len(positions) for positions in kept)]).cumsum(0)
    total, empty = int(offsets[-1]), torch.zeros(3, 0)
    return CachedBatch(
        tokens=torch.randn(total, channels, generator=generator).half(),
        token_scales=None,
        channel_scale=None,
        channel_shift=None,
        token_positions=torch.cat(kept),
        token_weights=torch.rand(total, generator=generator),
        token_offsets=offsets,
        level_shapes=shapes,
        queries=empty,
        logits=empty,
        boxes_cxcywh=empty,
        quality=empty,
        assignment=empty.long(),
        level_strides=strides,
    )


def each_token(cached: CachedBatch) -> Iterator[tuple[int, int, int, int, int]]:
    """(kept token, sample, level, row, column), counted with plain loops."""
    for sample in range(3):
        places = [
            (level, row, column)
            for level, (height, width) in enumerate(cached.level_shapes[sample].tolist())
            for row in range(height)
            for column in range(width)
        ]
        for index in range(int(cached.token_offsets[sample]), int(cached.token_offsets[sample + 1])):
            yield index, sample, *places[int(cached.token_positions[index])]


def samples_of(cached: CachedBatch) -> Tensor:
    return torch.repeat_interleave(torch.arange(3), cached.token_offsets.diff())


def test_levels_are_matched_by_nearest_stride() -> None:
    """By hand: equal strides, a stride of 24 between 16 and 32 (nearer to 32), beyond both ends, unequal axes."""
    strides = torch.tensor([(16, 16), (24, 24), (5, 5), (6, 6), (90, 90), (91, 91), (20, 51)], dtype=torch.float32)
    assert match_levels(strides, STRIDES).tolist() == [1, 2, -1, 0, 3, -1, 2]


@pytest.mark.parametrize("resizes", [True, False])
def test_token_places_against_plain_loops(resizes: bool) -> None:
    """Level and centre of every kept token against counting: equal levels, centres to 1e-4 pixels."""
    cached = make_cached(resizes, channels=1)
    assert cached.level_strides is not None
    places = token_places(cached.token_positions, samples_of(cached), cached.level_shapes, cached.level_strides)
    for index, sample, level, row, column in each_token(cached):
        seen = TEACHER_SIZE if resizes else SIZES[sample]
        expected = [
            (cell + 0.5) * TEACHER_STRIDES[level] * SIZES[sample][axis] / seen[axis]
            for axis, cell in enumerate((row, column))
        ]
        assert int(places.level[index]) == level
        assert places.centres_px[index].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_linear_map_is_sampled_exactly() -> None:
    """Features linear in y and x against the same line at the teacher's token centres: 1e-9 between the outermost cell
    centres; beyond them the value of the nearest one. Padding holds NaN, so that none of it may be mixed in."""
    shapes, mask = padded()
    valid = valid_shapes(mask, shapes)
    line = torch.tensor([0.3, -0.7], dtype=torch.float64)
    maps = torch.full((3, mask.shape[1]), torch.nan, dtype=torch.float64)
    start = 0
    for stride, (height, width) in zip(STRIDES, shapes, strict=True):
        y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
        values = ((y + 0.5) * stride * line[0] + (x + 0.5) * stride * line[1] + 2).flatten()
        maps[:, start : start + len(values)] = values
        start += len(values)
    maps[mask] = torch.nan
    cached, sample = make_cached(resizes=True, channels=1), samples_of(make_cached(resizes=True, channels=1))
    assert cached.level_strides is not None
    places = token_places(cached.token_positions, sample, cached.level_shapes, cached.level_strides)
    level = match_levels(cached.level_strides, STRIDES)[sample, places.level]
    assert (level >= 0).all()
    centres = places.centres_px.double()
    corners = bilinear_corners(centres, level, STRIDES, shapes, valid[sample, level])
    found = (maps[sample.unsqueeze(1), corners.indices] * corners.weights).sum(1)
    stride = torch.tensor(STRIDES)[level].unsqueeze(1)
    inside = centres.maximum(0.5 * stride).minimum((valid[sample, level] - 0.5) * stride)
    torch.testing.assert_close(found, inside @ line + 2, rtol=0, atol=1e-9)
    assert (inside == centres).all(1).float().mean() > 0.8


def test_corners_against_scipy() -> None:
    """Random features against scipy's map_coordinates (order 1, nearest beyond the border) on the unpadded map."""
    shapes, mask = padded()
    maps = torch.randn(3, mask.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cached = make_cached(resizes=True, channels=1)
    sample = samples_of(cached)
    assert cached.level_strides is not None
    places = token_places(cached.token_positions, sample, cached.level_shapes, cached.level_strides)
    level = match_levels(cached.level_strides, STRIDES)[sample, places.level]
    centres = places.centres_px.double()
    corners = bilinear_corners(centres, level, STRIDES, shapes, valid_shapes(mask, shapes)[sample, level])
    found = (maps[sample.unsqueeze(1), corners.indices] * corners.weights).sum(1)
    starts = np.cumsum([0, *(height * width for height, width in shapes)])
    for index in range(len(sample)):
        own, s = int(sample[index]), int(level[index])
        height, width = (-(-side // STRIDES[s]) for side in SIZES[own])
        grid = maps[own, starts[s] : starts[s + 1]].view(*shapes[s])[:height, :width].numpy()
        cell = (centres[index] / STRIDES[s] - 0.5).unsqueeze(1).numpy()
        assert float(found[index]) == pytest.approx(float(map_coordinates(grid, cell, order=1, mode="nearest")[0]))


def loss_by_grid_sample(tokens: Tensor, shapes: LevelShapes, cached: CachedBatch) -> Tensor:
    """The loss as one would write it for one sample and one level after the other, with torch's grid_sample."""
    assert cached.level_strides is not None
    matched = match_levels(cached.level_strides, STRIDES)
    starts = np.cumsum([0, *(height * width for height, width in shapes)])
    total = tokens.new_zeros(())
    counts = (cached.level_shapes.prod(-1) * (matched >= 0)).sum(1)
    for index, sample, level, row, column in each_token(cached):
        s = int(matched[sample, level])
        if s < 0:
            continue
        height, width = (-(-side // STRIDES[s]) for side in SIZES[sample])
        grid = tokens[sample, starts[s] : starts[s + 1]].view(*shapes[s], -1)[:height, :width].permute(2, 0, 1)
        dy, dx = cached.level_strides[sample, level].double().tolist()
        y, x = (row + 0.5) * dy / (height * STRIDES[s]), (column + 0.5) * dx / (width * STRIDES[s])
        at = tokens.new_tensor([2 * x - 1, 2 * y - 1]).view(1, 1, 1, 2)
        student = grid_sample(grid[None], at, align_corners=False, padding_mode="border").flatten()
        error = (cached.tokens[index].double() - student).square().sum()
        total = total + cached.token_weights[index] * error / (counts[sample] * tokens.shape[-1] * 3)
    return total


def loss_of(tokens: Tensor, shapes: LevelShapes, mask: Tensor, strides: tuple[int, ...], cached: CachedBatch) -> Tensor:
    return feature_loss(align(tokens, shapes, mask, strides, cached), cached)


@pytest.mark.parametrize("resizes", [True, False])
def test_resampled_loss_and_gradient_against_grid_sample(resizes: bool) -> None:
    """Batched loss and its gradient in the student's tokens against a loop over tokens with grid_sample, in float64:
    relative 1e-5 (the weights and centres are float32)."""
    shapes, mask = padded()
    cached = make_cached(resizes, channels=4)
    tokens = torch.randn(3, mask.shape[1], 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tokens.requires_grad_()
    assert not same_levels(cached, STRIDES)
    loss = loss_of(tokens, shapes, mask, STRIDES, cached)
    expected = loss_by_grid_sample(tokens, shapes, cached)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    (gradient,), (wanted,) = torch.autograd.grad(loss, tokens), torch.autograd.grad(expected, tokens)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-9)
    assert not gradient[mask].any()


def test_equal_grids_are_looked_up() -> None:
    """A teacher of the student's own levels: looked up, as the strides say, against interpolated, as it must be where
    strides differ by a hair: 1e-4."""
    shapes, mask = padded()
    cached = make_cached(resizes=False, channels=4)
    assert cached.level_strides is not None
    nearly = replace(cached, level_strides=cached.level_strides * (1 + 1e-6))
    assert same_levels(cached, TEACHER_STRIDES)
    assert not same_levels(nearly, TEACHER_STRIDES)
    shapes, mask = shapes[:3], mask[:, : sum(height * width for height, width in shapes[:3])]
    tokens = torch.randn(3, mask.shape[1], 4, generator=torch.Generator().manual_seed(2))
    found, interpolated = (loss_of(tokens, shapes, mask, TEACHER_STRIDES, batch) for batch in (cached, nearly))
    torch.testing.assert_close(found, interpolated, rtol=1e-4, atol=0)


def test_levels_without_a_partner_do_not_count() -> None:
    """A student of strides 32 and 64 beside a teacher of 8, 16, 32: tokens of 8 and 16 change nothing, and the loss is
    the others' weighted mean, written out token by token: relative 1e-5."""
    shapes, mask = padded()
    first = sum(height * width for height, width in shapes[:2])
    shapes, mask = shapes[2:], mask[:, first:]
    cached = make_cached(resizes=False, channels=4)
    assert cached.level_strides is not None
    tokens = torch.randn(3, mask.shape[1], 4, generator=torch.Generator().manual_seed(3))
    loss = loss_of(tokens, shapes, mask, (32, 64), cached)
    levels = token_places(cached.token_positions, samples_of(cached), cached.level_shapes, cached.level_strides).level
    cached.tokens[levels < 2] = 77.0
    torch.testing.assert_close(loss_of(tokens, shapes, mask, (32, 64), cached), loss)
    expected = 0.0
    for index, sample, level, row, column in each_token(cached):
        if level == 2:
            error = (cached.tokens[index].float() - tokens[sample, row * shapes[0][1] + column]).square().mean()
            count = int(cached.level_shapes[sample, 2].prod())
            expected += float(cached.token_weights[index] * error) / count / 3
    assert float(loss) == pytest.approx(expected, rel=1e-5)
