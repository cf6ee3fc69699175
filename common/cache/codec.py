"""How token features are stored: as floats, or as int8, int4 or int2 with scales after normalising the channels; and
how the teacher's logits are.

The channels of an encoder's memory differ in spread by an order of magnitude; without normalising them first, the
widest one would set the step for all. Decoding is one multiply-add, q * token_scale * channel_scale + channel_shift,
which the loss kernel does on the fly.

A step is token_scale * channel_scale. The scales of int8 and int4 are rounded up, so that no value is cut off: a
decoded value is within half a step of the teacher's when rounded to nearest, within one step and right on average when
rounded stochastically. int2 is -3, -1, 1 or 3 steps, whichever is nearest, with the step that makes the group's squared
error least: a value is within one step, or cut off if it is beyond four.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.cache.schema import CodecInfo, Rounding, TokenCodec

Floats = npt.NDArray[np.float32]
Stored = dict[str, npt.NDArray[Any]]

LARGEST = {"int8": 127, "int4": 7}  # symmetric around 0
# Worst absolute error of a decoded int8 or int4 in its own steps; the thousandth is what float32's arithmetic may add.
STEP_ERROR: dict[Rounding, float] = {"nearest": 0.5 + 2.0**-10, "stochastic": 1.0 + 2.0**-10}
INT2_STEP = 0.4979  # in standard deviations, the best for normal values (Max, 1960): where the search begins
INT2_ROUNDS = 4  # of the search; more change the error by less than a thousandth

SCORE_CODES = 255  # the largest of the codes that logits are stored as
SCORE_ERROR = np.pi / 4 / SCORE_CODES  # .0031: the most by which a score (the logit's sigmoid) changes


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


def encode_tokens(
    tokens: Floats,
    codec: TokenCodec,
    statistics: ChannelStatistics | None,
    rounding: Rounding = "nearest",
    key: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Stored:
    """The stored fields of tokens (S, C): `tokens`, and `token_scales` if quantised, which needs the statistics.

    int8: tokens (S, C), token_scales (S, 1). int4: tokens (S, C/2) uint8, the even channel in the low nibble and the
    odd one in the high nibble, in two's complement; token_scales (S, G) float16, one for each group of C/G neighbouring
    channels. int2: tokens (S, C/4) uint8, channel 4j + k in bits 2k and 2k + 1 of byte j, as (q + 3) / 2; token_scales
    as for int4; always rounded to nearest. key: (seed, image id, view, stream), which alone decides the stochastic
    rounding.
    """
    if codec == "fp32":
        return {"tokens": tokens}
    if codec == "fp16":
        return {"tokens": tokens.astype(np.float16)}
    assert statistics is not None, f"{codec} needs the channels' statistics"
    samples, channels = tokens.shape
    groups = CodecInfo(codec, 1.0).scales(channels)
    normalised = ((tokens - statistics.channel_shift) / statistics.channel_scale).reshape(samples, groups, -1)
    if codec == "int2":
        codes, scales = _int2(normalised)
        return {"tokens": pack_int2(codes.reshape(samples, channels)), "token_scales": scales}
    scales = _round_up(np.abs(normalised).max(axis=2) / LARGEST[codec])
    steps = (normalised / scales.astype(np.float32)[:, :, None]).reshape(samples, channels)
    steps = np.rint(steps) if rounding == "nearest" else np.floor(steps + _uniform(steps.shape, key))
    quantised = np.clip(steps, -LARGEST[codec], LARGEST[codec]).astype(np.int8)
    return {"tokens": pack_int4(quantised) if codec == "int4" else quantised, "token_scales": scales}


def decode_tokens(stored: Stored, statistics: ChannelStatistics | None) -> Floats:
    """Tokens (S, C) float32 from the fields that `encode_tokens` gave."""
    if "token_scales" not in stored:
        return stored["tokens"].astype(np.float32)
    assert statistics is not None, "quantised tokens need the channels' statistics"
    quantised, channels = stored["tokens"], len(statistics.channel_scale)
    if quantised.dtype == np.uint8:
        quantised = unpack_int4(quantised) if 2 * quantised.shape[1] == channels else 2 * unpack_int2(quantised) - 3
    step = token_steps(stored["token_scales"], statistics)
    return quantised.astype(np.float32) * step + statistics.channel_shift


def token_steps(token_scales: npt.NDArray[np.float16], statistics: ChannelStatistics) -> Floats:
    """The step (S, C) of every stored value, in which `largest_errors` are measured."""
    each = np.repeat(token_scales.astype(np.float32), len(statistics.channel_scale) // token_scales.shape[1], axis=1)
    return each * statistics.channel_scale


def largest_errors(tokens: Floats, stored: Stored, statistics: ChannelStatistics, rounding: Rounding) -> Floats:
    """The most (S, C) by which decoding int8, int4 or int2 may miss the tokens (S, C) that were encoded."""
    steps = token_steps(stored["token_scales"], statistics)
    if 4 * stored["tokens"].shape[1] > tokens.shape[1]:
        return steps * np.float32(STEP_ERROR[rounding])
    cut_off = np.abs(tokens - statistics.channel_shift) - 3 * steps
    bounds: Floats = np.maximum(steps, cut_off) + np.float32(2.0**-10) * steps
    return bounds


def encode_logits(logits: Floats) -> npt.NDArray[np.uint8]:
    """Logits of any shape as codes in 0..255: 255 * (2 / pi) * asin(sqrt(sigmoid(logit))), rounded to nearest.

    The derivative of a score by its code is (pi / 2) sqrt(p (1 - p)) / 127.5, at most pi / 2 / 255: no score changes by
    more than SCORE_ERROR, and small scores, of which there are many, by less (of .01, by .0006).
    """
    angle = np.arctan(np.exp(np.clip(logits, -80, 80).astype(np.float32) / 2))  # whose tangent is sqrt(p / (1 - p))
    codes: npt.NDArray[np.uint8] = np.rint(angle * np.float32(SCORE_CODES * 2 / np.pi)).astype(np.uint8)
    return codes


def decode_logits(stored: Tensor) -> Tensor:
    """Logits from what `encode_logits` gave, in float32; floats as they are.

    Codes 0 and 255, which stand for scores about 0 and 1, are taken for 0.25 and 254.75: logits of -13 and 13.
    """
    return stored if stored.is_floating_point() else _logits_of_codes(stored.device)[stored.int()]


@cache
def _logits_of_codes(device: torch.device) -> Tensor:
    codes = torch.arange(SCORE_CODES + 1, dtype=torch.float64).clamp(0.25, SCORE_CODES - 0.25)
    return (2 * (codes * (torch.pi / 2 / SCORE_CODES)).tan().log()).float().to(device)


def pack_int2(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(S, C) values in 0..3 as (S, C/4) bytes."""
    packed: npt.NDArray[np.uint8] = np.bitwise_or.reduce([codes[:, k::4] << np.uint8(2 * k) for k in range(4)])
    return packed


def unpack_int2(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """What `pack_int2` packed."""
    return np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(len(packed), -1).astype(np.int8)


def pack_int4(quantised: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """(S, C) values in -8..7 as (S, C/2) bytes."""
    nibbles = quantised.view(np.uint8) & 15
    packed: npt.NDArray[np.uint8] = np.bitwise_or(nibbles[:, ::2], nibbles[:, 1::2] << 4, dtype=np.uint8)
    return packed


def unpack_int4(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """What `pack_int4` packed."""
    nibbles = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1).astype(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.int8)


def _int2(normalised: Floats) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16]]:
    """Codes (q + 3) / 2 of values (S, G, C/G), and a scale (S, G) for each group.

    Lloyd's algorithm for four levels that are evenly spaced: the nearest level of each value, then the scale of least
    squares for these levels, and again.
    """
    scales = INT2_STEP * np.sqrt(np.square(normalised).mean(axis=2, keepdims=True))
    for _ in range(INT2_ROUNDS):
        levels = 2 * _int2_codes(normalised, scales) - np.float32(3)
        scales = (normalised * levels).sum(axis=2, keepdims=True) / np.square(levels).sum(axis=2, keepdims=True)
    limits = np.finfo(np.float16)
    halves = np.clip(scales, limits.tiny, limits.max).astype(np.float16)
    return _int2_codes(normalised, halves.astype(np.float32)).astype(np.uint8), halves[:, :, 0]


def _int2_codes(normalised: Floats, scales: Floats) -> Floats:
    """Which of -3, -1, 1 and 3 times the scale is nearest, in 0..3."""
    codes: Floats = np.clip(np.floor(normalised / np.maximum(scales, 1e-30) * np.float32(0.5)) + 2, 0, 3)
    return codes


def _round_up(scales: Floats) -> npt.NDArray[np.float16]:
    """The least float16 that is not below, and neither 0 nor infinite."""
    limits = np.finfo(np.float16)
    rounded = np.clip(scales, limits.tiny, limits.max).astype(np.float16)
    up: npt.NDArray[np.float16] = np.nextafter(rounded, np.float16(limits.max))
    return np.where(rounded.astype(np.float32) < scales, up, rounded)


def _uniform(shape: tuple[int, ...], key: tuple[int, int, int, int]) -> Floats:
    """Random numbers in [0, 1) from the counter-based generator of Philox: the same from every version of numpy."""
    seed, image_id, view, stream = key
    count = int(np.prod(shape))
    # The generator counts up the first word of its counter, which therefore names no sample.
    words = np.random.Philox(counter=[0, image_id, view, stream], key=[seed, 1]).random_raw(-(-count // 2))
    bits = words.astype("<u8").view("<u4")[:count]
    return ((bits >> 8) * np.float32(2.0**-24)).astype(np.float32).reshape(shape)
