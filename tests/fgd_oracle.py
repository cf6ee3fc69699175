"""FGD as its article writes it: one feature map after another, maps as (C, H, W), loops over boxes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, layer_norm, relu

from common.records import Targets
from student_train.fgd_loss import FgdBlocks, GlobalContext

ALPHA, BETA, GAMMA, LAMBDA, TEMPERATURE = 1e-3, 5e-4, 5e-4, 5e-6, 0.5


def fgd_directly(
    teacher: list[list[Tensor]], student: list[list[Tensor]], targets: list[Targets], blocks: FgdBlocks
) -> dict[str, Tensor]:
    """The four terms from maps[sample][level] (C, H, W), each without padding."""
    sums = {
        name: torch.zeros((), dtype=torch.float64) for name in ("foreground", "background", "attention", "relation")
    }
    for teacher_maps, student_maps, target in zip(teacher, student, targets, strict=True):
        for level, (t, s) in enumerate(zip(teacher_maps, student_maps, strict=True)):
            t, s = t.double(), s.double()
            channels, height, width = t.shape
            foreground, background = masks(height, width, target.boxes_cxcywh)
            spatial, channel = attentions(t)
            own_spatial, own_channel = attentions(s)
            error = spatial[None] * channel[:, None, None] * (t - s) ** 2
            sums["foreground"] += ALPHA * (foreground * error).sum()
            sums["background"] += BETA * (background * error).sum()
            sums["attention"] += GAMMA * ((spatial - own_spatial).abs().sum() + (channel - own_channel).abs().sum())
            difference = with_context(t, blocks.teacher[level]) - with_context(s, blocks.student[level])
            sums["relation"] += LAMBDA * difference.square().sum()
            assert channels == len(channel)
    return {name: total / len(teacher) for name, total in sums.items()}


def masks(height: int, width: int, boxes_cxcywh: Tensor) -> tuple[Tensor, Tensor]:
    foreground = torch.zeros(height, width, dtype=torch.float64)
    for centre_x, centre_y, box_width, box_height in boxes_cxcywh.tolist():
        left, right = math.floor((centre_x - box_width / 2) * width), math.ceil((centre_x + box_width / 2) * width)
        top, bottom = math.floor((centre_y - box_height / 2) * height), math.ceil((centre_y + box_height / 2) * height)
        share = 1 / ((bottom - top + 1) * (right - left + 1))
        for y in range(max(0, top), min(height - 1, bottom) + 1):
            for x in range(max(0, left), min(width - 1, right) + 1):
                foreground[y, x] = max(float(foreground[y, x]), share)
    background = (foreground == 0).double()
    return foreground, background / max(1.0, float(background.sum()))


def attentions(features: Tensor) -> tuple[Tensor, Tensor]:
    channels, height, width = features.shape
    spatial = (features.abs().mean(0) / TEMPERATURE).flatten().softmax(0).view(height, width) * height * width
    return spatial, (features.abs().mean((1, 2)) / TEMPERATURE).softmax(0) * channels


def with_context(features: Tensor, block: GlobalContext) -> Tensor:
    """The map after its context block, whose linear layers are 1x1 convolutions here."""
    channels = len(features)
    weight, bias = block.attention.weight.double()[:, :, None, None], block.attention.bias.double()
    share = conv2d(features[None], weight, bias).flatten().softmax(0).view(features.shape[1:])
    context = (features * share).sum((1, 2))
    first, norm, _, last = block.transform
    hidden = conv2d(context.view(1, channels, 1, 1), first.weight.double()[:, :, None, None], first.bias.double())
    hidden = relu(layer_norm(hidden.flatten(), (channels // 2,), norm.weight.double(), norm.bias.double()))
    added = conv2d(hidden.view(1, -1, 1, 1), last.weight.double()[:, :, None, None], last.bias.double())
    return features + added[0]


def maps_of(tokens: Tensor, grids: list[tuple[int, int]]) -> list[Tensor]:
    """Tokens (T, C) of one sample as maps (C, H, W)."""
    levels = tokens.split([height * width for height, width in grids])
    return [level.T.reshape(-1, *grid) for level, grid in zip(levels, grids, strict=True)]
