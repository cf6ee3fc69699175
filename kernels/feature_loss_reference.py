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
    codebooks: Tensor | None = None,
) -> Tensor:
    """Cached tokens as floats (S, C): `q * scales[s, group(c)] * channel_scale[c] + channel_shift[c]`.

    tokens: (S, C) float32, float16 or int8; (S, C/2) uint8 holding two int4 in -8..7: the even channel in the low
    nibble, the odd one in the high nibble, both in two's complement; or, with codebooks (M, 256, C/M) float32, (S, M)
    uint8 codes of product quantisation (Jegou et al., TPAMI 2011), where channels m * C/M to (m + 1) * C/M of q are the
    centroid codebooks[m, tokens[s, m]].
    """
    if codebooks is not None:
        groups = torch.arange(len(codebooks), device=codebooks.device)
        decoded = codebooks.to(dtype)[groups, tokens.long()].flatten(1)
    else:
        decoded = (unpack_int4(tokens) if tokens.dtype == torch.uint8 else tokens).to(dtype)
    if scales is not None:
        decoded = decoded * scales.to(dtype).repeat_interleave(decoded.shape[1] // scales.shape[1], dim=1)
    if channel_scale is not None:
        decoded = decoded * channel_scale.to(dtype)
    return decoded if channel_shift is None else decoded + channel_shift.to(dtype)


def unpack_int4(tokens: Tensor) -> Tensor:
    """The whole numbers (S, C) int8 in the bytes (S, C/2); see `decode_tokens`."""
    nibbles = torch.stack((tokens & 15, tokens >> 4), dim=-1).flatten(1).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def cached_feature_loss_reference(
    student: Tensor,
    tokens: Tensor,
    rows: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    codebooks: Tensor | None = None,
) -> Tensor:
    """`cached_feature_loss` with each token's row (S,) in the flattened (B*T, C) student; differentiable in student."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    kept = student.flatten(0, 1).index_select(0, rows).to(dtype)
    difference = decode_tokens(tokens, scales, channel_scale, channel_shift, dtype, codebooks) - kept
    return (weights.to(dtype) * difference.square().sum(1)).sum()
