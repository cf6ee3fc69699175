"""The losses on the neck's features and between queries (released, FGD, contrastive) against their equations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from common.geometry import token_count, token_positions_in_batch
from common.matching import pad_targets
from common.records import CachedBatch, LevelShapes, Targets
from student_train.contrastive_loss import ContrastiveHeads, contrastive_loss
from student_train.feature_loss import align, neck_loss
from student_train.fgd_loss import FgdBlocks, fgd_losses
from tests.fgd_oracle import fgd_directly, maps_of

CPU = torch.device("cpu")
CHANNELS = 8
STRIDES = (8, 16)
GRIDS: list[LevelShapes] = [[(4, 5), (2, 3)], [(6, 2), (3, 1)], [(3, 3), (2, 2)]]
BATCH_SHAPES: LevelShapes = [(8, 8), (4, 4)]


def drawn() -> tuple[Tensor, Tensor, CachedBatch]:
    """The student's features (B, T, C) with 1e3 where padded, the mask, and records with their neck."""
    generator = torch.Generator().manual_seed(0)
    sizes = [token_count(grid) for grid in GRIDS]
    student = torch.full((len(GRIDS), token_count(BATCH_SHAPES), CHANNELS), 1e3)
    mask = torch.ones(student.shape[:2], dtype=torch.bool)
    for index, grid in enumerate(GRIDS):
        inside = token_positions_in_batch(grid, BATCH_SHAPES)
        student[index, inside] = torch.randn(len(inside), CHANNELS, generator=generator)
        mask[index, inside] = False
    empty = torch.zeros(0)
    cached = CachedBatch(
        tokens=empty,
        token_scales=None,
        channel_scale=None,
        channel_shift=None,
        token_positions=torch.cat([torch.arange(size) for size in sizes]),
        token_weights=empty,
        token_offsets=torch.tensor([0, *sizes]).cumsum(0),
        level_shapes=torch.tensor(GRIDS),
        queries=empty,
        logits=empty,
        boxes_cxcywh=empty,
        quality=empty,
        assignment=empty,
        level_strides=torch.tensor(STRIDES).float()[None, :, None].expand(len(GRIDS), -1, 2),
        neck=torch.randn(sum(sizes), CHANNELS, generator=generator),
        neck_weights=torch.rand(sum(sizes), generator=generator),
    )
    return student.requires_grad_(), mask, cached


def targets() -> list[Targets]:
    """Overlapping boxes, one of them over the border, none on a cell's edge; none; one that covers everything."""
    boxes = [[[0.41, 0.52, 0.53, 0.39], [0.51, 0.49, 0.21, 0.23], [0.93, 0.12, 0.2, 0.31]], [], [[0.5, 0.5, 1.0, 1.0]]]
    return [Targets(torch.tensor(b).view(-1, 4), torch.zeros(len(b), dtype=torch.int64)) for b in boxes]


def student_maps(student: Tensor) -> list[list[Tensor]]:
    return [
        maps_of(tokens[token_positions_in_batch(grid, BATCH_SHAPES)], grid)
        for tokens, grid in zip(student, GRIDS, strict=True)
    ]


def teacher_maps(cached: CachedBatch) -> list[list[Tensor]]:
    assert cached.neck is not None
    samples = cached.neck.split([token_count(grid) for grid in GRIDS])
    return [maps_of(tokens, grid) for tokens, grid in zip(samples, GRIDS, strict=True)]


def trained_blocks() -> FgdBlocks:
    """Context blocks that add something, as they do once trained; they begin by adding nothing."""
    torch.manual_seed(0)
    blocks = FgdBlocks(CHANNELS, len(STRIDES))
    for parameter in blocks.parameters():
        nn.init.normal_(parameter, std=0.5)
    return blocks


def test_released_feature_loss_counts_the_padding_in_its_means() -> None:
    """Sum over levels of sum W (F_T - F_S)^2 / (B C H W) with H and W of the padded batch, in float64: 1e-6 relative.

    The padding's features are 1e3: were one of them read, the loss would be far off.
    """
    student, mask, cached = drawn()
    assert cached.neck_weights is not None
    expected = torch.zeros((), dtype=torch.float64)
    weights = cached.neck_weights.split([token_count(grid) for grid in GRIDS])
    for own, theirs, w, grid in zip(student_maps(student), teacher_maps(cached), weights, GRIDS, strict=True):
        of_levels = maps_of(w[:, None], grid)
        for s, t, weight, (height, width) in zip(own, theirs, of_levels, BATCH_SHAPES, strict=True):
            error = weight.double() * (t.double() - s.double()) ** 2
            expected = expected + error.sum() / (len(GRIDS) * CHANNELS * height * width)
    loss = neck_loss(align(student, BATCH_SHAPES, mask, STRIDES, cached), cached)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_fgd_against_the_article_map_by_map() -> None:
    """All four terms, their gradient in the student's features and in the context blocks, against dense maps one by one
    in float64, with overlapping boxes, an image without boxes and one without background: relative 1e-4."""
    student, mask, cached = drawn()
    blocks = trained_blocks()
    parameters = [student, *blocks.parameters()]
    found = fgd_losses(align(student, BATCH_SHAPES, mask, STRIDES, cached), cached, pad_targets(targets(), CPU), blocks)
    expected = fgd_directly(teacher_maps(cached), student_maps(student), targets(), blocks)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-4, atol=0, msg=name)
        gradients = torch.autograd.grad(found[name], parameters, retain_graph=True, allow_unused=True)
        wanted = torch.autograd.grad(expected[name], parameters, retain_graph=True, allow_unused=True)
        for gradient, want in zip(gradients, wanted, strict=True):
            if want is None or gradient is None:
                assert want is None or not want.any()
                assert gradient is None or not gradient.any()
            else:
                # Next to nothing in a bias within a softmax, which changes nothing.
                atol = max(1e-4 * float(want.abs().max()), 1e-10)
                torch.testing.assert_close(gradient, want.float(), rtol=1e-3, atol=atol)


def test_fgd_of_images_without_boxes_is_finite() -> None:
    """No box in the whole batch: no foreground, and the background as map by map: relative 1e-4."""
    student, mask, cached = drawn()
    nothing = [Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))] * 3
    blocks = trained_blocks()
    found = fgd_losses(align(student, BATCH_SHAPES, mask, STRIDES, cached), cached, pad_targets(nothing, CPU), blocks)
    expected = fgd_directly(teacher_maps(cached), student_maps(student), nothing, blocks)
    assert found["foreground"].item() == 0
    torch.testing.assert_close(found["background"].double(), expected["background"], rtol=1e-4, atol=0)
    assert all(loss.isfinite() for loss in found.values())


def test_levels_without_a_partner_do_not_count() -> None:
    """A student of the coarse level alone learns that level: losses of both kinds against records that hold only it
    (the mean's padding aside): relative 1e-5. Its boxes are all features of stride 16."""
    student, mask, cached = drawn()
    fine = BATCH_SHAPES[0][0] * BATCH_SHAPES[0][1]
    coarse, coarse_mask = student[:, fine:], mask[:, fine:]
    blocks = trained_blocks()
    aligned = align(coarse, BATCH_SHAPES[1:], coarse_mask, (16,), cached)
    found = fgd_losses(aligned, cached, pad_targets(targets(), CPU), blocks)
    only = FgdBlocks(CHANNELS, 1)
    only.student[0], only.teacher[0] = blocks.student[1], blocks.teacher[1]
    expected = fgd_directly(
        [maps[1:] for maps in teacher_maps(cached)], [maps[1:] for maps in student_maps(student)], targets(), only
    )
    for name in found:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-4, atol=1e-9, msg=name)
    before = neck_loss(aligned, cached)
    assert cached.neck is not None
    levels = torch.cat([torch.arange(2).repeat_interleave(torch.tensor(grid).prod(1)) for grid in GRIDS])
    other = replace(cached, neck=cached.neck.where((levels == 1)[:, None], 55.0))
    torch.testing.assert_close(neck_loss(aligned, other), before, rtol=0, atol=0)
    assert before > 0


@pytest.mark.parametrize("training", [True, False])
def test_contrastive_loss_against_pairs_one_by_one(training: bool) -> None:
    """Sum over layers of the mean of -log softmax, pair by pair with each query's own similarity to all others, for
    other widths and query counts of the teacher; -1 in the matching is no pair: relative 1e-5."""
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(2, 2, 6, 8, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 2, 5, 12, generator=generator)
    matched = torch.tensor([[[0, 3, -1], [2, 1, 4]], [[5, -1, -1], [0, 2, -1]]])
    index = torch.tensor([[[1, 0, 4], [3, 2, 0]], [[4, 0, 0], [1, 0, 2]]])
    torch.manual_seed(0)
    heads = ContrastiveHeads(8, 12).train(training)
    expected = torch.zeros(())
    for layer in range(2):
        pairs = [(b, n) for b in range(2) for n in range(3) if matched[b, layer, n] >= 0]
        s = heads.student(torch.stack([student[b, layer, matched[b, layer, n]] for b, n in pairs]))
        t = heads.teacher(torch.stack([teacher[b, layer, index[b, layer, n]] for b, n in pairs]))
        for i in range(len(pairs)):
            similar = torch.stack([torch.cosine_similarity(t[i], s[j], dim=0) / 0.07 for j in range(len(pairs))])
            expected = expected + (similar.exp().sum().log() - similar[i]) / len(pairs)
    loss = contrastive_loss(student, teacher, matched, index, heads)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
    assert gradient.any()


def test_contrastive_loss_without_pairs() -> None:
    """No pair in one layer and one pair in the other: 0, and every parameter of the heads still has a gradient."""
    heads = ContrastiveHeads(8, 8)
    matched = torch.tensor([[[-1], [0]]])
    loss = contrastive_loss(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), matched, matched.clamp(min=0), heads)
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None for parameter in heads.parameters())
