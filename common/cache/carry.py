"""Rounding to int2 that carries each token's error on to the next one, as error diffusion does for grey tones.

Two bits leave a large error in each value, and nearest rounding makes neighbouring tokens, which are much alike, err
alike. A student's weights see sums over tokens of weight x error: so what rounding left over of one token is added to
the next one before that is rounded, and errors cancel (Floyd and Steinberg, 1976, in one direction). A single value is
less exact for it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kernels.jit import jit

Floats = npt.NDArray[np.float32]


def carried_codes(values: Floats, scales: Floats, weights: Floats) -> npt.NDArray[np.uint8]:
    """Codes (S, C) in 0..3, for -3, -1, 1 and 3 scales, of values (S, C), token by token in their order.

    scales: (S, G), one for each group of C/G channels. weights: (S,), none negative. Of what a token leaves over, at
    most one scale is carried on, in the ratio of the tokens' weights, but never enlarged.
    """
    following = np.append(weights[1:], np.float32(0))
    shares = np.divide(weights, following, out=np.ones_like(weights), where=following > weights)
    codes = np.empty(values.shape, np.uint8)
    _carry(np.ascontiguousarray(values), np.ascontiguousarray(scales), shares, np.zeros_like(values[:1]), codes)
    return codes


@jit()
def _carry(values, scales, shares, left, codes):  # type: ignore[no-untyped-def]
    """No liberties with the arithmetic: every processor writes the same bytes."""
    channels, group = values.shape[1], values.shape[1] // scales.shape[1]
    for s in range(values.shape[0]):
        for c in range(channels):
            scale = scales[s, c // group]
            wanted = values[s, c] + left[0, c]
            code = min(max(np.floor(wanted / (scale + scale)) + np.float32(2), np.float32(0)), np.float32(3))
            error = wanted - (code + code - np.float32(3)) * scale
            left[0, c] = min(max(error, -scale), scale) * shares[s]
            codes[s, c] = np.uint8(code)
