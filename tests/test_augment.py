"""Augmentation: its generator against numpy's, its sizes and crops against DETR's rules, its replay against itself."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional

from common.augment import EVAL_POLICY, TRAIN_POLICY, AugmentPolicy, draw, draw_many, evaluation_policy, flip_policy
from common.coco import load_annotations
from common.errors import UserError
from common.images import load_image
from common.philox import choose, happens, philox_words
from common.records import Augmentation, ImageEntry
from common.replay import apply_boxes, apply_image

SIDES = st.integers(16, 2000)


def entry_with(boxes: list[list[float]], width: int = 100, height: int = 80) -> ImageEntry:
    array = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return ImageEntry(1, "one.jpg", width, height, array, np.arange(len(boxes)))


def test_philox_words_equal_numpys() -> None:
    """Keys and counters that use all 64 bits, and a carry of numpy's own counter; exactly equal."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        key = generator.integers(0, 2**64, 2, dtype=np.uint64)
        counters = generator.integers(0, 2**64, (5, 4), dtype=np.uint64)
        words = philox_words((int(key[0]), int(key[1])), counters)
        for counter, row in zip(counters, words, strict=True):
            before = (sum(int(word) << (64 * place) for place, word in enumerate(counter)) - 1) % 2**256
            expected = np.random.Philox(key=key, counter=before).random_raw(4)  # numpy steps the counter first
            assert row.tolist() == expected.tolist()


def test_choices_are_even_and_cover_their_range() -> None:
    """60000 words into 1, 7 and 600 choices and against probabilities: all occur, frequencies within 6 sigma."""
    words = philox_words((1, 2), np.arange(60_000, dtype=np.uint64).reshape(-1, 4)).ravel()
    for choices in (1, 7, 600):
        counts = np.bincount(choose(words, choices), minlength=choices)
        expected = len(words) / choices
        assert len(counts) == choices
        assert np.abs(counts - expected).max() <= 6 * expected**0.5
    for probability in (0.0, 0.3, 1.0):
        share = happens(words, probability).mean()
        assert abs(share - probability) <= 6 * (probability * (1 - probability) / len(words)) ** 0.5


def test_draws_are_pinned() -> None:
    """Known views: what a seed means must survive every upgrade of numpy, torch and this code."""
    views = [draw(7, 139, view, 640, 426, TRAIN_POLICY) for view in range(4)]
    assert views == [
        Augmentation(False, 0, 0, 426, 640, 768, 1153),
        Augmentation(False, 4, 57, 376, 476, 768, 972),
        Augmentation(False, 0, 0, 426, 640, 768, 1153),
        Augmentation(True, 0, 0, 426, 640, 800, 1201),
    ]
    large = draw(2**63 + 1, 2**40 + 5, 1, 333, 500, TRAIN_POLICY)
    assert large == Augmentation(True, 46, 1, 408, 329, 912, 736)
    assert draw(7, 139, 0, 640, 426, EVAL_POLICY) == Augmentation(False, 0, 0, 426, 640, 800, 1201)


def test_one_draw_is_a_row_of_many() -> None:
    """200 samples drawn together, alone, and together in another order; exactly equal."""
    generator = np.random.default_rng(1)
    ids, views = generator.integers(0, 2**40, 200), generator.integers(0, 50, 200)
    widths, heights = generator.integers(20, 900, 200), generator.integers(20, 900, 200)
    rows = draw_many(5, ids, views, widths, heights, TRAIN_POLICY)
    assert rows.dtype == np.int32
    alone = [draw(5, *map(int, values), TRAIN_POLICY) for values in zip(ids, views, widths, heights, strict=True)]
    assert rows.tolist() == [[int(value) for value in dataclasses.astuple(view)] for view in alone]
    order = generator.permutation(200)
    shuffled = draw_many(5, ids[order], views[order], widths[order], heights[order], TRAIN_POLICY)
    assert np.array_equal(shuffled, rows[order])


def test_views_seeds_and_images_draw_differently() -> None:
    """64 views each of two seeds and two images: hardly any two alike."""
    drawn = [
        draw(seed, image_id, view, 640, 480, TRAIN_POLICY)
        for seed in (0, 1)
        for image_id in (1, 2)
        for view in range(64)
    ]
    assert max(Counter(drawn).values()) <= 10  # 22 views have no crop: those do recur
    assert len({view for view in drawn if view.crop_width < 640}) > 0.4 * len(drawn)


def official_size(width: int, height: int, side: int, longest: int) -> tuple[int, int]:
    """DETR's resize rule as a formula, exact: the short side, rounded half to even where the long side limits it."""
    short, long = min(width, height), max(width, height)
    if Fraction(long, short) * side > longest:
        side = max(round(Fraction(longest * short, long)), 1)
    other = min(int(Fraction(side * long, short)), longest)
    return (side, other) if width <= height else (other, side)


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, st.integers(0, 2**62))
def test_evaluation_sizes_follow_the_official_rule(width: int, height: int, image_id: int) -> None:
    """800 / 1333, against exact fractions."""
    a = draw(0, image_id, 0, width, height, EVAL_POLICY)
    assert (a.width, a.height) == official_size(width, height, 800, 1333)
    assert dataclasses.replace(a, height=0, width=0) == Augmentation(False, 0, 0, height, width, 0, 0)


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, st.integers(0, 2**62))
def test_training_views_stay_in_the_image_and_follow_the_recipe(width: int, height: int, image_id: int) -> None:
    """Crops inside, of a size that one of the three resized images allows; output one of eleven scales."""
    a = draw(0, image_id, 3, width, height, TRAIN_POLICY)
    assert 0 <= a.crop_top <= a.crop_top + a.crop_height <= height
    assert 0 <= a.crop_left <= a.crop_left + a.crop_width <= width
    sizes = {official_size(a.crop_width, a.crop_height, side, 1333) for side in range(480, 801, 32)}
    assert (a.width, a.height) in sizes
    if (a.crop_width, a.crop_height) == (width, height):
        return
    fits = []
    for side in (400, 500, 600):
        # In the resized image the window measures 384..600 on each side, or all of it where that is less.
        seen_width, seen_height = official_size(width, height, side, 10**9)
        half_pixel_x, half_pixel_y = 0.5 * seen_width / width, 0.5 * seen_height / height
        seen = (a.crop_width * seen_width / width, a.crop_height * seen_height / height)
        fits.append(
            384 - half_pixel_x <= seen[0] <= 600 + half_pixel_x and 384 - half_pixel_y <= seen[1] <= 600 + half_pixel_y
        )
    assert any(fits)


def test_recipe_frequencies() -> None:
    """20000 views of one size: half mirrored, half cropped, independently; eleven scales alike; 5 sigma."""
    n = 20_000
    size = np.full(n, 640), np.full(n, 480)
    flip, _, _, crop_height, crop_width, height, _ = draw_many(0, np.arange(n), np.zeros(n, int), *size, TRAIN_POLICY).T
    sigma = (0.25 / n) ** 0.5
    cropped = (crop_height < 480) | (crop_width < 640)
    # A window as large as the image is a crop that does not show: 400 x 533 seen has one of 17 x 150 windows.
    assert abs(flip.mean() - 0.5) < 5 * sigma
    assert abs(cropped.mean() - 0.5) < 5 * sigma + 1 / 2000
    assert abs((flip & cropped).mean() - 0.25) < 5 * sigma
    counts = Counter(height[~cropped].tolist())
    assert sorted(counts) == list(range(480, 801, 32))
    expected = (~cropped).sum() / 11
    assert max(abs(count - expected) for count in counts.values()) < 5 * expected**0.5


def test_small_policies() -> None:
    """Square images keep their pixels, others fit inside; only the flip varies."""
    assert {draw(0, i, 0, 128, 128, flip_policy(128)) for i in range(40)} == {
        Augmentation(False, 0, 0, 128, 128, 128, 128),
        Augmentation(True, 0, 0, 128, 128, 128, 128),
    }
    assert draw(0, 1, 0, 200, 100, evaluation_policy(flip_policy(128))) == Augmentation(False, 0, 0, 100, 200, 64, 128)


@pytest.mark.parametrize("policy", [TRAIN_POLICY, EVAL_POLICY, flip_policy(96)])
def test_policies_survive_json(policy: AugmentPolicy) -> None:
    assert AugmentPolicy(**json.loads(json.dumps(dataclasses.asdict(policy)))) == policy


@pytest.mark.parametrize(
    "change",
    [
        {"flip_probability": 1.5},
        {"short_sides": ()},
        {"max_long_side": 700},
        {"crop_short_sides": ()},
        {"crop_min": 601},
    ],
)
def test_impossible_policies_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(UserError, match="expected probabilities"):
        AugmentPolicy(**{**dataclasses.asdict(TRAIN_POLICY), **change})


def test_pixels_are_cropped_resized_then_mirrored(coco_nano: Path) -> None:
    """Against torchvision's resized_crop and horizontal_flip on a real image: within 1 of 255, .2 on average.

    torchvision rounds its weights otherwise; a box or an axis mistaken would differ by tens.
    """
    entry = load_annotations(coco_nano, "train2017").entries[0]
    image = load_image(coco_nano / "train2017" / entry.file_name)
    for view in range(6):
        a = draw(0, entry.image_id, view, entry.width, entry.height, TRAIN_POLICY)
        box = (a.crop_top, a.crop_left, a.crop_height, a.crop_width)
        expected = functional.resized_crop(image, *box, [a.height, a.width], antialias=True)
        expected = functional.horizontal_flip(expected) if a.flip else expected
        result = apply_image(image, a)
        assert (result.dtype, result.shape) == (torch.uint8, (3, a.height, a.width))
        difference = (result.int() - expected.int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.2


def test_a_view_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit an image of 30 x 20"):
        apply_image(torch.zeros(3, 20, 30, dtype=torch.uint8), Augmentation(False, 0, 5, 20, 26, 8, 8))


def test_boxes_follow_the_pixels() -> None:
    """White rectangles on black, crop, resize and mirror: each box is where its white pixels are, 1.5 px."""
    generator = np.random.default_rng(0)
    policy = AugmentPolicy("test", 0.5, (90, 140), 300, 1.0, (70, 120), 50, 90)
    for image_id in range(60):
        width, height = generator.integers(60, 160, 2).tolist()
        x, y = generator.integers(0, width - 20), generator.integers(0, height - 20)
        w, h = generator.integers(8, width - x), generator.integers(8, height - y)
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        image[:, y : y + h, x : x + w] = 255
        a = draw(3, image_id, 0, width, height, policy)
        targets = apply_boxes(entry_with([[x, y, x + w, y + h]], width, height), a)
        rows, columns = np.nonzero(apply_image(image, a)[0].numpy() > 127)
        if len(targets.labels) == 0:
            assert len(rows) == 0
            continue
        if len(rows) == 0:  # a sliver that covers less than half of a pixel
            assert (targets.boxes_cxcywh[0, 2:] * torch.tensor([a.width, a.height])).min() < 1
            continue
        cx, cy, bw, bh = (targets.boxes_cxcywh[0] * torch.tensor([a.width, a.height] * 2)).tolist()
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2], expected, rtol=0, atol=1.5)


def test_boxes_are_clipped_dropped_mirrored_and_keep_their_order() -> None:
    """By hand: a crop of 40 x 20 at (10, 30), mirrored; a box inside, one across, one outside, one touching."""
    entry = entry_with([[20, 35, 30, 40], [0, 0, 5, 5], [0, 40, 20, 80], [50, 30, 60, 50]])
    targets = apply_boxes(entry, Augmentation(True, 30, 10, crop_height=20, crop_width=40, height=100, width=200))
    assert targets.labels.tolist() == [0, 2]
    expected = [[1 - 0.375, 0.375, 0.25, 0.25], [1 - 0.125, 0.75, 0.25, 0.5]]
    assert targets.boxes_cxcywh.tolist() == expected
    assert (targets.boxes_cxcywh.dtype, targets.labels.dtype) == (torch.float32, torch.int64)
    nothing = apply_boxes(entry_with([]), Augmentation(True, 0, 0, 80, 100, 80, 100))
    assert (nothing.boxes_cxcywh.shape, nothing.labels.shape) == ((0, 4), (0,))


def _replay(folder: Path, numbers: list[int], threads: int = 1) -> dict[int, tuple[bytes, bytes]]:
    """Pixels and boxes, as bytes, of the given samples of the real data set, drawn and replayed here."""
    torch.set_num_threads(threads)
    annotations, samples = load_annotations(folder, "train2017"), {}
    for number in numbers:
        entry = annotations.entries[number % 6]
        a = draw(11, entry.image_id, number // 6, entry.width, entry.height, TRAIN_POLICY)
        pixels = apply_image(load_image(annotations.image_path(entry)), a)
        samples[number] = (pixels.numpy().tobytes(), apply_boxes(entry, a).boxes_cxcywh.numpy().tobytes())
    return samples


def test_replay_is_bit_identical_in_any_order_thread_and_process(coco_nano: Path) -> None:
    """12 samples of real images one after another, against reversed, on 4 Python threads, with 2 torch threads, and in
    a fresh process: all bytes equal."""
    numbers = list(range(12))
    expected = _replay(coco_nano, numbers)
    assert len({pixels for pixels, _ in expected.values()}) == 12
    assert _replay(coco_nano, numbers[::-1]) == expected
    with ThreadPoolExecutor(4) as pool:
        for part in pool.map(lambda number: _replay(coco_nano, [number]), numbers):
            assert all(expected[number] == sample for number, sample in part.items())
    threads = torch.get_num_threads()
    try:
        assert _replay(coco_nano, numbers, threads=2) == expected
    finally:
        torch.set_num_threads(threads)
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        assert processes.apply(_replay, (coco_nano, numbers)) == expected
