"""Feature maps -> tokens -> encoder memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.detr.attention import DeformableAttention, FeedForward, SamplingFrame, frame_of_points
from common.detr.config import DetectorConfig
from common.records import LevelShapes
from kernels import to_device


class Neck(nn.Module):
    """Backbone maps -> maps of one width: 1x1 convolutions, then 3x3 ones of stride 2 for levels beyond C5.

    The first extra level is computed from C5 itself, each further one from the level before it.
    """

    def __init__(self, channels: Sequence[int], levels: int, width: int) -> None:
        super().__init__()
        extra = [channels[-1], *[width] * levels][: levels - len(channels)]
        self.levels = nn.ModuleList(
            [_Projection(c, width, kernel=1) for c in channels] + [_Projection(c, width, kernel=3) for c in extra]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        outputs = [level(x) for level, x in zip(self.levels, maps, strict=False)]
        x = maps[-1]
        for level in self.levels[len(maps) :]:
            x = level(x)
            outputs.append(x)
        return outputs


class _Projection(nn.Module):
    """Convolution and group norm; 32 groups, or as many as divide both 32 and a narrower width."""

    def __init__(self, channels: int, width: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride=1 if kernel == 1 else 2, padding=kernel // 2)
        self.norm = nn.GroupNorm(math.gcd(32, width), width)
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(self.conv.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.conv(x))
        return normed


class EncoderLayer(nn.Module):
    """Deformable self-attention over the tokens of all levels, then feed-forward; post-norm."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.attention = DeformableAttention(config.width, config.heads, config.levels, config.points)
        self.attention_norm = nn.LayerNorm(config.width)
        self.feedforward = FeedForward(config.width, config.feedforward, config.dropout)
        self.feedforward_norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, tokens: Tensor, positions: Tensor, frame: SamplingFrame, token_mask: Tensor, shapes: LevelShapes
    ) -> Tensor:
        attended = self.attention(tokens + positions, frame, tokens, token_mask, shapes)
        tokens = self.attention_norm(tokens + self.dropout(attended))
        out: Tensor = self.feedforward_norm(tokens + self.feedforward(tokens))
        return out


class Encoder(nn.Module):
    """Neck tokens (B, T, C) -> memory (B, T, C).

    checkpointed: training keeps each layer's input alone, and computes the layer again on the way back.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.checkpointed = False
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(
        self, tokens: Tensor, positions: Tensor, token_mask: Tensor, shapes: LevelShapes, valid_ratios: Tensor
    ) -> Tensor:
        """valid_ratios: (B, levels, 2), the unpadded share of each level's width and height."""
        points = cell_centres(shapes, valid_ratios)[:, :, None] * valid_ratios[:, None]
        frame = frame_of_points(points, shapes)
        for layer in self.layers:
            if self.checkpointed and torch.is_grad_enabled():
                tokens = checkpoint(layer, tokens, positions, frame, token_mask, shapes, use_reentrant=False)
            else:
                tokens = layer(tokens, positions, frame, token_mask, shapes)
        return tokens


def cell_centres(shapes: LevelShapes, valid_ratios: Tensor) -> Tensor:
    """(B, T, 2): the centre (x, y) of each token's cell relative to the sample's own, unpadded extent."""
    centres = []
    sizes = to_device(torch.tensor(shapes), valid_ratios.device).flip(-1)  # (levels, 2), width and height
    for level, (height, width) in enumerate(shapes):
        y = torch.arange(height, device=valid_ratios.device, dtype=valid_ratios.dtype) + 0.5
        x = torch.arange(width, device=valid_ratios.device, dtype=valid_ratios.dtype) + 0.5
        grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).flatten(0, 1)
        valid_cells = (valid_ratios[:, level] * sizes[level]).round()
        centres.append(grid / valid_cells[:, None])
    return torch.cat(centres, 1)


def level_masks(padding_mask: Tensor, shapes: LevelShapes) -> list[Tensor]:
    """The pixel mask (B, H, W), True where padded, as each level sees it: at the nearest pixel; (B, height, width)."""
    pixels = padding_mask[None].float()
    return [nn.functional.interpolate(pixels, size=shape)[0].bool() for shape in shapes]


def valid_share(masks: Sequence[Tensor]) -> Tensor:
    """(B, levels, 2): the unpadded share of each level's width and height, read off the mask's first row and column."""
    shares = [torch.stack([(~m[:, 0]).float().mean(-1), (~m[:, :, 0]).float().mean(-1)], -1) for m in masks]
    return torch.stack(shares, 1)
