"""How token features are stored: as floats, as int8 or int4 with scales after normalising the channels, or as the
bytes of product quantisation (product.py); and how the teacher's logits are.

The channels of an encoder's memory differ in spread by an order of magnitude; without normalising them first, the
widest one would set the step for all. Decoding is one multiply-add, q * token_scale * channel_scale + channel_shift,
or one look-up, which the loss kernel does on the fly.

A step is token_scale * channel_scale. Scales are rounded up, so that no value is cut off: a decoded value is within
half a step of the teacher's when rounded to nearest, within one step and right on average when rounded stochastically.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.cache.product import Codebooks, decode_codes, encode_codes
from common.cache.schema import CodecInfo, Rounding, TokenCodec

Floats = npt.NDArray[np.float32]
Stored = dict[str, npt.NDArray[Any]]

LARGEST = {"int8": 127, "int4": 7}  # symmetric around 0
# Worst absolute error of a decoded int8 or int4 in its own steps; the thousandth is what float32's arithmetic may add.
STEP_ERROR: dict[Rounding, float] = {"nearest": 0.5 + 2.0**-10, "stochastic": 1.0 + 2.0**-10}

SCORE_CODES = 255  # the largest of the codes that logits are stored as
SCORE_ERROR = np.pi / 4 / SCORE_CODES  # .0031: the most by which a score (the logit's sigmoid) changes


@dataclass(frozen=True)
class ChannelStatistics:
    """Spread and mean of every channel, (C,) float32 each, over some of the teacher's tokens."""

    channel_scale: Floats
    channel_shift: Floats


Decoding = ChannelStatistics | Codebooks
"""What a store has once to decode its tokens, if they are not floats."""


def measure_channels(tokens: Floats) -> ChannelStatistics:
    """Statistics of tokens (T, C); a channel that never varies gets scale 1."""
    spread = tokens.std(axis=0, dtype=np.float64).astype(np.float32)
    mean = tokens.mean(axis=0, dtype=np.float64).astype(np.float32)
    return ChannelStatistics(channel_scale=np.where(spread > 0, spread, np.float32(1)), channel_shift=mean)


def encode_tokens(
    tokens: Floats,
    codec: TokenCodec,
    statistics: Decoding | None,
    rounding: Rounding = "nearest",
    key: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Stored:
    """The stored fields of tokens (S, C): `tokens`, and `token_scales` of int8 and int4, which need the statistics.

    int8: tokens (S, C), token_scales (S, 1). int4: tokens (S, C/2) uint8, the even channel in the low nibble and the
    odd one in the high nibble, in two's complement; token_scales (S, G) float16, one for each group of C/G neighbouring
    channels. pq8, pq4: tokens (S, C/8) or (S, C/4) uint8, which need the codebooks. key: (seed, image id, view,
    stream), which alone decides the stochastic rounding.
    """
    if codec == "fp32":
        return {"tokens": tokens}
    if codec == "fp16":
        with np.errstate(over="ignore"):  # who stores them refuses infinity
            return {"tokens": tokens.astype(np.float16)}
    if isinstance(statistics, Codebooks):
        return {"tokens": encode_codes(tokens, statistics)}
    assert statistics is not None, f"{codec} needs the channels' statistics or codebooks"
    samples, channels = tokens.shape
    groups = CodecInfo(codec, 1.0).scales(channels)
    normalised = ((tokens - statistics.channel_shift) / statistics.channel_scale).reshape(samples, groups, -1)
    scales = _round_up(np.abs(normalised).max(axis=2) / LARGEST[codec])
    steps = (normalised / scales.astype(np.float32)[:, :, None]).reshape(samples, channels)
    steps = np.rint(steps) if rounding == "nearest" else np.floor(steps + _uniform(steps.shape, key))
    quantised = np.clip(steps, -LARGEST[codec], LARGEST[codec]).astype(np.int8)
    return {"tokens": pack_int4(quantised) if codec == "int4" else quantised, "token_scales": scales}


def decode_tokens(stored: Stored, statistics: Decoding | None) -> Floats:
    """Tokens (S, C) float32 from the fields that `encode_tokens` gave."""
    if isinstance(statistics, Codebooks):
        return decode_codes(stored["tokens"], statistics)
    if statistics is None:
        return stored["tokens"].astype(np.float32)
    quantised = stored["tokens"]
    if quantised.dtype == np.uint8:
        quantised = unpack_int4(quantised)
    step = token_steps(stored["token_scales"], statistics)
    return quantised.astype(np.float32) * step + statistics.channel_shift


def token_steps(token_scales: npt.NDArray[np.float16], statistics: ChannelStatistics) -> Floats:
    """The step (S, C) of every stored value, in which `largest_errors` are measured."""
    each = np.repeat(token_scales.astype(np.float32), len(statistics.channel_scale) // token_scales.shape[1], axis=1)
    return each * statistics.channel_scale


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


def pack_int4(quantised: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """(S, C) values in -8..7 as (S, C/2) bytes."""
    nibbles = quantised.view(np.uint8) & 15
    packed: npt.NDArray[np.uint8] = np.bitwise_or(nibbles[:, ::2], nibbles[:, 1::2] << 4, dtype=np.uint8)
    return packed


def unpack_int4(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """What `pack_int4` packed."""
    nibbles = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1).astype(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.int8)


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
