"""The feature loss on cached tokens in plain PyTorch: the truth the other versions are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_tokens(
    tokens: Tensor,
    scales: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    dtype: torch.dtype,
    channels: int | None = None,
) -> Tensor:
    """Cached tokens as floats (S, C): `q * scales[s, group(c)] * channel_scale[c] + channel_shift[c]`.

    tokens: (S, C) float32, float16 or int8; (S, C/2) uint8 holding two int4 in -8..7: the even channel in the low
    nibble, the odd one in the high nibble, both in two's complement; or (S, C/4) uint8 holding four int2, -3, -1, 1 or
    3: channel 4j + k in bits 2k and 2k + 1 of byte j, as (q + 3) / 2. channels: C, which tells these two apart where
    channel_scale does not; int4 if neither is given.
    """
    if tokens.dtype == torch.uint8:
        if channels is None:
            channels = 2 * tokens.shape[1] if channel_scale is None else len(channel_scale)
        tokens = unpack(tokens, channels)
    decoded = tokens.to(dtype)
    if scales is not None:
        decoded = decoded * scales.to(dtype).repeat_interleave(decoded.shape[1] // scales.shape[1], dim=1)
    if channel_scale is not None:
        decoded = decoded * channel_scale.to(dtype)
    return decoded if channel_shift is None else decoded + channel_shift.to(dtype)


def unpack(tokens: Tensor, channels: int) -> Tensor:
    """The whole numbers (S, C) int8 in the bytes (S, C/2) of int4 or (S, C/4) of int2; see `decode_tokens`."""
    if 2 * tokens.shape[1] == channels:
        nibbles = torch.stack((tokens & 15, tokens >> 4), dim=-1).flatten(1).to(torch.int8)
        return torch.where(nibbles > 7, nibbles - 16, nibbles)
    codes = torch.stack([(tokens >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1).to(torch.int8)
    return 2 * codes - 3


def cached_feature_loss_reference(
    student: Tensor,
    tokens: Tensor,
    rows: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
) -> Tensor:
    """`cached_feature_loss` with each token's row (S,) in the flattened (B*T, C) student; differentiable in student."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    kept = student.flatten(0, 1).index_select(0, rows).to(dtype)
    difference = decode_tokens(tokens, scales, channel_scale, channel_shift, dtype, student.shape[2]) - kept
    return (weights.to(dtype) * difference.square().sum(1)).sum()
