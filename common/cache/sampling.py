"""Which tokens of a sample are kept, and with what weight.

The feature loss weighs token t by W(t). Keeping the heaviest tokens would bias it; instead S of T tokens are drawn
without replacement, token t with inclusion probability pi(t) = min(1, c W(t)), and kept with weight W(t) / pi(t): the
sum over the kept tokens is an unbiased estimate of the loss and of its gradient (Horvitz and Thompson, 1952). Drawing
systematically along the rows of the feature maps spreads the kept tokens evenly over the image.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def inclusion_probabilities(weights: npt.NDArray[np.float32], kept: int) -> npt.NDArray[np.float64]:
    """pi (T,) float64 with pi = min(1, c * weights) and sum exactly `kept`; tokens of weight 0 fill up what is left.

    weights: (T,), none negative. 0 <= kept <= T.
    """
    weights = weights.astype(np.float64)
    positive = int(np.count_nonzero(weights))
    if kept >= positive:  # every token that counts is kept; the others share the remaining places
        rest = (kept - positive) / max(1, len(weights) - positive)
        return np.where(weights > 0, 1.0, rest).astype(np.float64)
    # With the m heaviest tokens certain, c = (kept - m) / (sum of the others); m is the smallest for which the
    # heaviest of the others stays at or below 1.
    descending = np.sort(weights)[::-1]
    others = descending[::-1].cumsum()[::-1]
    certain = np.arange(kept)
    scale = (kept - certain) / others[:kept]
    m = int(np.argmax(scale * descending[:kept] <= 1 + 1e-12))
    probabilities: npt.NDArray[np.float64] = np.minimum(1.0, weights * scale[m])
    return probabilities


def draw_tokens(
    weights: npt.NDArray[np.float32], kept: int, key: tuple[int, int, int]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Positions (kept,), ascending, and weights W / pi (kept,) of the tokens that a sample keeps.

    key: (seed, image id, view), which alone decides the draw.
    """
    if kept == len(weights):
        return np.arange(kept, dtype=np.int32), weights.astype(np.float32)
    probabilities = inclusion_probabilities(weights, kept)
    seed, image_id, view = key
    start = np.random.Philox(counter=[image_id, view, 0, 0], key=[seed, 0]).random_raw() / 2.0**64
    # One token where the running sum of pi passes start, start + 1, ...: exactly `kept` of them.
    passed = np.floor(probabilities.cumsum() - start)
    passed[-1] = kept - 1  # against rounding in the sum
    positions = np.flatnonzero(np.diff(passed, prepend=-1.0) > 0)
    return positions.astype(np.int32), (weights[positions] / probabilities[positions]).astype(np.float32)
