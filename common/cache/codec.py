"""How token features are stored: as floats, or as int8 with one scale per token after normalising the channels.

The channels of an encoder's memory differ in spread by an order of magnitude; without normalising them first, the
widest one would set the step for all. Decoding is one multiply-add, q * token_scale * channel_scale + channel_shift,
which the loss kernel does on the fly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.cache.schema import TokenCodec

Floats = npt.NDArray[np.float32]
Stored = dict[str, npt.NDArray[Any]]

# Worst absolute error of a decoded int8 value, in units of its token's scale times its channel's: half a step of
# rounding, and what rounding the scale itself to float16 moves the largest value.
INT8_STEP_ERROR = 0.5 + 127 * 2.0**-11


@dataclass(frozen=True)
class ChannelStatistics:
    """Spread and mean of every channel, (C,) float32 each, over some of the teacher's tokens."""

    channel_scale: Floats
    channel_shift: Floats


def measure_channels(tokens: Floats) -> ChannelStatistics:
    """Statistics of tokens (T, C); a channel that never varies gets scale 1."""
    spread = tokens.std(axis=0, dtype=np.float64).astype(np.float32)
    mean = tokens.mean(axis=0, dtype=np.float64).astype(np.float32)
    return ChannelStatistics(channel_scale=np.where(spread > 0, spread, np.float32(1)), channel_shift=mean)


def encode_tokens(tokens: Floats, codec: TokenCodec, statistics: ChannelStatistics | None) -> Stored:
    """The stored fields of tokens (S, C): `tokens`, and `token_scales` (S, 1) for int8, which needs the statistics."""
    if codec == "fp32":
        return {"tokens": tokens}
    if codec == "fp16":
        return {"tokens": tokens.astype(np.float16)}
    assert statistics is not None, "int8 needs the channels' statistics"
    normalised = (tokens - statistics.channel_shift) / statistics.channel_scale
    largest = np.abs(normalised).max(axis=1, keepdims=True)
    scales = np.maximum(largest / 127, np.finfo(np.float16).tiny).astype(np.float16)
    steps = np.rint(normalised / scales.astype(np.float32))
    return {"tokens": np.clip(steps, -127, 127).astype(np.int8), "token_scales": scales}


def decode_tokens(stored: Stored, statistics: ChannelStatistics | None) -> Floats:
    """Tokens (S, C) float32 from the fields that `encode_tokens` gave."""
    tokens = stored["tokens"].astype(np.float32)
    if "token_scales" not in stored:
        return tokens
    assert statistics is not None, "int8 needs the channels' statistics"
    return tokens * stored["token_scales"].astype(np.float32) * statistics.channel_scale + statistics.channel_shift
