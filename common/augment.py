"""The first half of augmentation: `draw` resolves it to integers, which `common.replay` replays on pixels and boxes.

The recipe is Deformable DETR's (arXiv 2010.04159, the one of DETR): mirror half of the images; resize the short side to
one of 480..800 with the long side at most 1333; half of the images are first resized to 400, 500 or 600 and cropped to
384..600 on each side. Here the crop is taken on the original pixels and the result is resized once, which shows the
same without resampling twice. Mirroring comes last, so the crop's position is in the unmirrored original.

A view is drawn by a counter-based generator from (seed, image id, view) alone: no state, so every rank and worker draws
the same view of a sample, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.philox import choose, happens, philox_words
from common.records import Augmentation

Integers = npt.NDArray[np.int64]

# The generator's second key: to be raised when the meaning of its words changes, so that old draws never half recur.
_DRAW_VERSION = 1


@dataclass(frozen=True)
class AugmentPolicy:
    """What may be drawn. `dataclasses.asdict` makes it json, `AugmentPolicy(**...)` reads it back.

    Sizes are in pixels. short_sides: the short side becomes one of these, unless the long side would exceed
    max_long_side. With crop_probability the image is seen as resized to a short side of one of crop_short_sides, and a
    window of crop_min..crop_max pixels (at most the image) is cut from it, width and height drawn separately.
    """

    name: str
    flip_probability: float
    short_sides: tuple[int, ...]
    max_long_side: int
    crop_probability: float = 0.0
    crop_short_sides: tuple[int, ...] = ()
    crop_min: int = 0
    crop_max: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "short_sides", tuple(self.short_sides))  # json has lists
        object.__setattr__(self, "crop_short_sides", tuple(self.crop_short_sides))
        probabilities_fit = 0 <= self.flip_probability <= 1 and 0 <= self.crop_probability <= 1
        sides_fit = bool(self.short_sides) and 0 < min(self.short_sides) <= max(self.short_sides) <= self.max_long_side
        crop_fits = self.crop_probability == 0 or (
            bool(self.crop_short_sides) and min(self.crop_short_sides) > 0 and 0 < self.crop_min <= self.crop_max
        )
        if not (probabilities_fit and sides_fit and crop_fits):
            raise UserError(
                "expected probabilities in 0..1, short sides of 1 to max_long_side pixels, and for a crop short sides "
                f"and 0 < crop_min <= crop_max, found {self}"
            )


TRAIN_POLICY = AugmentPolicy(
    name="deformable_detr",
    flip_probability=0.5,
    short_sides=tuple(range(480, 801, 32)),
    max_long_side=1333,
    crop_probability=0.5,
    crop_short_sides=(400, 500, 600),
    crop_min=384,
    crop_max=600,
)
EVAL_POLICY = AugmentPolicy(name="evaluation", flip_probability=0.0, short_sides=(800,), max_long_side=1333)


def flip_policy(side: int) -> AugmentPolicy:
    """Images made to fit into side x side pixels and mirrored half of the time: for small trials."""
    return AugmentPolicy(name=f"flip_{side}", flip_probability=0.5, short_sides=(side,), max_long_side=side)


def policy_of_sizes(sizes: tuple[int, ...] | None) -> AugmentPolicy:
    """The training policy of `--sizes`: TRAIN_POLICY without them; else mirrored half of the time, and no crops.

    One size makes images fit into a square of it; of several, one is drawn for the short side.
    """
    if not sizes:
        return TRAIN_POLICY
    if len(sizes) == 1:
        return flip_policy(sizes[0])
    return AugmentPolicy(
        name="flip_resize", flip_probability=0.5, short_sides=tuple(sizes), max_long_side=round(max(sizes) * 5 / 3)
    )


def evaluation_policy(training: AugmentPolicy) -> AugmentPolicy:
    """How to see whole images after training with a policy: at its largest short side. EVAL_POLICY for TRAIN_POLICY."""
    return AugmentPolicy("evaluation", 0.0, (max(training.short_sides),), training.max_long_side)


def draw(seed: int, image_id: int, view: int, width: int, height: int, policy: AugmentPolicy) -> Augmentation:
    """One view of one image of width x height pixels: one row of `draw_many`."""
    image_ids, views, widths, heights = (np.array([value], dtype=np.int64) for value in (image_id, view, width, height))
    flip, *rest = draw_many(seed, image_ids, views, widths, heights, policy)[0].tolist()
    return Augmentation(bool(flip), *rest)


def draw_many(
    seed: int, image_ids: Integers, views: Integers, widths: Integers, heights: Integers, policy: AugmentPolicy
) -> npt.NDArray[np.int32]:
    """Views of many images, (N, 7) in the order of Augmentation's fields, from arrays (N,)."""
    flip_word, crop_word, crop_side_word, width_word, height_word, left_word, top_word, side_word = _words(
        seed, image_ids, views
    )
    crop_widths, crop_heights = widths.copy(), heights.copy()
    lefts, tops = np.zeros_like(widths), np.zeros_like(heights)
    cropped = np.flatnonzero(happens(crop_word, policy.crop_probability))
    if len(cropped):
        side = np.array(policy.crop_short_sides)[choose(crop_side_word[cropped], len(policy.crop_short_sides))]
        seen_widths, seen_heights = _resized(widths[cropped], heights[cropped], side, max_long_side=None)
        crop_widths[cropped], lefts[cropped] = _window(
            widths[cropped], seen_widths, width_word[cropped], left_word[cropped], policy
        )
        crop_heights[cropped], tops[cropped] = _window(
            heights[cropped], seen_heights, height_word[cropped], top_word[cropped], policy
        )
    short_sides = np.array(policy.short_sides)[choose(side_word, len(policy.short_sides))]
    out_widths, out_heights = _resized(crop_widths, crop_heights, short_sides, policy.max_long_side)
    flips = happens(flip_word, policy.flip_probability)
    columns = (flips, tops, lefts, crop_heights, crop_widths, out_heights, out_widths)
    return np.stack(columns, axis=1).astype(np.int32)


def _words(seed: int, image_ids: Integers, views: Integers) -> tuple[npt.NDArray[np.uint64], ...]:
    """Eight random words for each sample: blocks 1 and 2 of counter (block, view, image id, 0)."""
    counters = np.zeros((len(image_ids), 4), dtype=np.uint64)
    counters[:, 1], counters[:, 2] = views, image_ids
    blocks = []
    for block in (1, 2):
        counters[:, 0] = block
        blocks.append(philox_words((seed & 0xFFFFFFFFFFFFFFFF, _DRAW_VERSION), counters))
    return tuple(np.concatenate(blocks, axis=1).T)


def _window(
    sizes: Integers,
    seen_sizes: Integers,
    size_word: npt.NDArray[np.uint64],
    start_word: npt.NDArray[np.uint64],
    policy: AugmentPolicy,
) -> tuple[Integers, Integers]:
    """Length and start, in original pixels, of a window drawn on the resized image, along one side."""
    high = np.minimum(seen_sizes, policy.crop_max)
    low = np.minimum(high, policy.crop_min)
    seen_lengths = low + choose(size_word, high - low + 1)
    # Rounded half up, in integers.
    lengths = np.clip((2 * seen_lengths * sizes + seen_sizes) // (2 * seen_sizes), 1, sizes)
    return lengths, choose(start_word, sizes - lengths + 1)


def _resized(
    widths: Integers, heights: Integers, short_sides: Integers, max_long_side: int | None
) -> tuple[Integers, Integers]:
    """Sizes with the given short side and the same shape, smaller where the long side would exceed its maximum.

    DETR's rule, long side rounded down. Where DETR's own rounding exceeds the maximum by a pixel, this stays at it.
    """
    short, long = np.minimum(widths, heights), np.maximum(widths, heights)
    if max_long_side is not None:
        too_long = long * short_sides > max_long_side * short
        short_sides = np.where(too_long, np.rint(max_long_side * short / long).astype(np.int64), short_sides)
    new_short = np.maximum(short_sides, 1)
    new_long = new_short * long // short
    if max_long_side is not None:
        new_long = np.minimum(new_long, max_long_side)
    return np.where(widths <= heights, new_short, new_long), np.where(widths <= heights, new_long, new_short)
