"""Sine encodings of positions: of tokens for the encoder, of proposed boxes for the two-stage decoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sine_encoding(x: Tensor, features: int) -> Tensor:
    """x (...) -> (..., features): sine and cosine of x / 10000^(2i / features), alternating (arXiv 1706.03762, 3.5)."""
    pairs = torch.arange(features, device=x.device).div(2, rounding_mode="floor")
    angles = x[..., None] / 10000.0 ** (2 * pairs / features)
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1).flatten(-2)


def token_encoding(mask: Tensor, width: int) -> Tensor:
    """Position encoding of one level's tokens, (B, height * width, C): half of the channels for y, half for x.

    mask: (B, height, width), True where padded. Coordinates are those of cell centres over the sample's own, unpadded
    extent, scaled to 0..2 pi.
    """
    valid = (~mask).float()
    y, x = valid.cumsum(1), valid.cumsum(2)
    y = (y - 0.5) / (y[:, -1:] + 1e-6) * (2 * math.pi)
    x = (x - 0.5) / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    return torch.cat([sine_encoding(y, width // 2), sine_encoding(x, width // 2)], -1).flatten(1, 2)


def box_encoding(boxes_cxcywh: Tensor, width: int) -> Tensor:
    """Boxes (B, Q, 4) in 0..1 -> (B, Q, 2C), C / 2 features for each coordinate (arXiv 2010.04159, appendix A.4)."""
    return sine_encoding(boxes_cxcywh.float() * (2 * math.pi), width // 2).flatten(-2)
