"""Philox 4x64-10, a counter-based random generator, over whole arrays of counters.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): a keyed bijection turns a counter into 256
random bits, so any draw is had at once, in any order, on any machine. The words are those of
`numpy.random.Philox(...).random_raw()`, which is made for one counter after another.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_MASK_64 = 0xFFFFFFFFFFFFFFFF
_LOW_32 = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox_words(key: tuple[int, int], counters: Words) -> Words:
    """Random words (N, 4) of counters (N, 4), all uint64, under one key of two 64-bit integers."""
    c0, c1, c2, c3 = counters.T
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK_64, (k1 + _KEY_STEPS[1]) & _MASK_64
    return np.stack((c0, c1, c2, c3), axis=1)


def choose(words: Words, choices: npt.NDArray[np.int64] | int) -> npt.NDArray[np.int64]:
    """Integers (N,) in 0..choices-1 from random words (N,), for choices of 1..2^31.

    The upper half of the word times the number of choices, over 2^32: integer arithmetic alone, so that no library's
    idea of a distribution enters. Its bias is below choices / 2^32.
    """
    chosen: Words = (words >> _32) * np.asarray(choices, dtype=np.uint64) >> _32
    return chosen.astype(np.int64)


def happens(words: Words, probability: float) -> npt.NDArray[np.bool_]:
    """True (N,) with the given probability, resolved to 2^-32."""
    happening: npt.NDArray[np.bool_] = (words >> _32) < np.uint64(round(probability * 2**32))
    return happening


def _multiply(values: Words, factor: int) -> tuple[Words, Words]:
    """Upper and lower 64 bits of the products with a 64-bit factor, from products of 32-bit halves."""
    factor_high, factor_low = np.uint64(factor >> 32), np.uint64(factor & 0xFFFFFFFF)
    high, low = values >> _32, values & _LOW_32
    middle = high * factor_low + (low * factor_low >> _32)  # at most 2^64 - 2^32: no overflow
    middle_2 = low * factor_high + (middle & _LOW_32)
    return high * factor_high + (middle >> _32) + (middle_2 >> _32), values * np.uint64(factor)
