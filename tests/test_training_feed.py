"""What training is fed: the order of samples, replayed pixels, what is damaged; and what is said of its time."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.augment import TRAIN_POLICY, draw, draw_many, flip_policy
from common.cache.reader import CacheReader
from common.coco import load_annotations
from common.errors import UserError
from common.images import PADDING_MULTIPLE, load_image
from common.replay import apply_boxes, apply_image
from common.runtime import Ranks
from student_train.batching import (
    Indices,
    Sizes,
    epoch_order,
    group_by_size,
    micro_batches,
    rank_share,
    steps_per_epoch,
)
from student_train.feed import CachedViews, Feed, FeedOptions, FreshViews, Work
from student_train.progress import Progress, Totals, bottleneck
from student_train.teachers import CachedTeachers
from tests.training_cases import IMAGES, SIDE, make_store

OPTIONS = FeedOptions(batch_size=4, seed=3, workers=3, prefetch=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("feed"))


@pytest.fixture
def views(folder: Path) -> FreshViews:
    return FreshViews(load_annotations(folder / "scenes", "train2017"), flip_policy(SIDE), seed=3)


def test_the_feed_replays_in_order_from_any_step(views: FreshViews) -> None:
    """Its images against decoding and augmenting them one by one here: equal bit for bit, in the order of the epoch;
    an epoch begun at step 1 is the same epoch without its first step, and parts of a step are the step in order."""
    feed = Feed(views, views.annotations, None, OPTIONS)
    steps = list(feed.epoch(5))
    order = feed.order(5).tolist()
    assert sorted(order) == list(range(IMAGES))
    assert order != feed.order(6).tolist()
    assert [image_id for step in steps for image_id in step.image_ids] == [
        views.annotations.entries[index].image_id for index in order
    ]
    for step in steps:
        (part,) = step.parts
        for row, image_id in enumerate(part.image_ids):
            entry = next(entry for entry in views.annotations.entries if entry.image_id == image_id)
            augmentation = draw(3, image_id, 5, entry.width, entry.height, flip_policy(SIDE))
            image = apply_image(load_image(views.annotations.image_path(entry)), augmentation)
            assert torch.equal(part.batch.images[row, :, :SIDE, :SIDE], image)
            assert torch.equal(part.batch.targets[row].boxes_cxcywh, apply_boxes(entry, augmentation).boxes_cxcywh)
        assert step.box_counts == [len(targets.labels) for targets in part.batch.targets]
    later = list(feed.epoch(5, first_step=1))
    feed.close()
    assert [(step.number, step.image_ids) for step in later] == [(s.number, s.image_ids) for s in steps[1:]]

    feed = Feed(views, views.annotations, None, replace(OPTIONS, accumulate=3))
    parted = list(feed.epoch(5))
    feed.close()
    assert [len(step.parts) for step in parted] == [3, 3, 2]
    assert [step.image_ids for step in parted] == [step.image_ids for step in steps]


def test_epochs_of_a_store_see_its_views_in_turn(folder: Path) -> None:
    """Epoch e takes view e mod 2, each of its rows once; the augmentation, and the sizes for batching, are the store's.
    Of plain training, the sizes are those of the views drawn."""
    reader = CacheReader(folder / "store.zarr")
    annotations = load_annotations(folder / "scenes", "train2017")
    source = CachedViews(annotations, reader)
    for epoch in range(3):
        samples = [source.sample(epoch, index) for index in range(len(source))]
        assert sorted(sample.row for sample in samples) == reader.rows(epoch % 2).tolist()
        for sample in samples:
            assert int(reader.table.image_id[sample.row]) == sample.entry.image_id
            assert tuple(reader.table.augmentation[sample.row]) == tuple(vars(sample.augmentation).values())
    reader.close()
    for either in (source, FreshViews(annotations, TRAIN_POLICY, seed=1)):
        augmentations = [either.sample(1, index).augmentation for index in range(IMAGES)]
        assert either.sizes(1).tolist() == [[a.height, a.width] for a in augmentations]


def test_ranks_and_parts_share_every_step() -> None:
    """Three ranks' shares of each step, and their parts, are disjoint and together the step of one rank; no rank and no
    part is ever without a sample."""
    order = epoch_order(IMAGES, 0, 0)
    for batch_size in (3, 4, 7):
        ranks = [Ranks(rank, rank, 3) for rank in range(3)]
        for step in range(steps_per_epoch(IMAGES, batch_size, ranks[0])):
            shares = [rank_share(order, step, batch_size, rank) for rank in ranks]
            parts = [part for share in shares for part in micro_batches(share, 2)]
            assert all(len(part) for part in [*shares, *parts])
            whole = rank_share(order, step, batch_size, Ranks()).tolist()
            assert np.concatenate(shares).tolist() == np.concatenate(parts).tolist() == whole


def padding_share(sizes: Sizes, batches: Sequence[Indices]) -> float:
    """The share of padding in the pixels of these batches of samples of `sizes` (N, 2)."""
    sides = [-(-sizes[batch].max(axis=0) // PADDING_MULTIPLE) * PADDING_MULTIPLE for batch in batches]
    padded = sum(len(batch) * int(height) * int(width) for batch, (height, width) in zip(batches, sides, strict=True))
    return 1 - sum(int(sizes[batch].prod(axis=1, dtype=np.int64).sum()) for batch in batches) / padded


def test_grouping_by_size_saves_padding() -> None:
    """4999 views of COCO's commonest sizes in batches of 4: grouping is a permutation, depends on (seed, epoch) alone,
    leaves the incomplete batch's samples as they were, and brings the share of padding from a third to below a tenth.
    Whether a sample comes early or late does not depend on its size: the correlation of position and area is below 5
    standard errors."""
    generator = np.random.default_rng(0)
    shapes = np.array([(640, 480), (480, 640), (640, 427), (427, 640), (500, 375), (640, 360)])
    chosen = shapes[generator.integers(len(shapes), size=4999)]
    ids = np.arange(4999)
    sizes = draw_many(0, ids, np.zeros_like(ids), *chosen.T.copy(), TRAIN_POLICY)[:, 5:7]
    order = epoch_order(4999, 7, 2)
    grouped = group_by_size(order, sizes, 4, 7, 2)
    assert sorted(grouped.tolist()) == list(range(4999))
    assert grouped.tolist() == group_by_size(order, sizes, 4, 7, 2).tolist()
    assert grouped.tolist() != group_by_size(order, sizes, 4, 8, 2).tolist()
    assert grouped[4996:].tolist() == order[4996:].tolist()
    shares = [padding_share(sizes, np.split(chosen, range(4, 4999, 4))) for chosen in (order, grouped)]
    assert shares[0] > 0.3
    assert shares[1] < 0.1
    areas = sizes.prod(axis=1)[grouped]
    batches = areas[:4996].reshape(-1, 4).mean(axis=1)
    correlation = np.corrcoef(np.arange(len(batches)), batches)[0, 1]
    assert abs(correlation) < 5 / np.sqrt(len(batches))


def test_broken_images(folder: Path, tmp_path: Path) -> None:
    """A truncated JPEG stops the feed with its name; with skip_broken another sample takes its place, so that every
    step keeps its size, and it is listed. With no image left that can be read, it is an error."""
    annotations = load_annotations(folder / "scenes", "train2017")
    images = tmp_path / "images"
    images.mkdir()
    for entry in annotations.entries:
        data = annotations.image_path(entry).read_bytes()
        broken = entry.image_id == annotations.entries[2].image_id
        (images / entry.file_name).write_bytes(data[: len(data) // 3] if broken else data)
    views = FreshViews(replace(annotations, image_folder=images), flip_policy(SIDE), seed=3)
    name = annotations.entries[2].file_name
    feed = Feed(views, views.annotations, None, OPTIONS)
    with pytest.raises(UserError, match=f"{name}.*--skip-broken"):
        list(feed.epoch(0))
    feed.close()
    feed = Feed(views, views.annotations, None, replace(OPTIONS, skip_broken=True))
    seen = [step.image_ids for step in feed.epoch(0)]
    assert feed.broken == {name}
    assert [len(image_ids) for image_ids in seen] == [4, 4, 2]
    others = {entry.image_id for entry in annotations.entries if entry.file_name != name}
    assert {image_id for image_ids in seen for image_id in image_ids} == others
    for path in images.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no sample of the epoch can be read"):
        list(feed.epoch(0))
    feed.close()


def test_damaged_records(folder: Path, tmp_path: Path) -> None:
    """A byte of a store's tokens changed: the feed stops, naming image and flag; with skip_corrupt another sample takes
    the place of each damaged one, its record beside its pixels, and they are listed."""
    store = tmp_path / "store.zarr"
    shutil.copytree(folder / "store.zarr", store)
    file = max((path for path in store.rglob("tokens/*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    annotations = load_annotations(folder / "scenes", "train2017")
    reader, sound = CacheReader(store), CacheReader(folder / "store.zarr")
    (damage,) = reader.read_sound(reader.rows())[1]
    source = CachedViews(annotations, reader)
    feed = Feed(source, annotations, CachedTeachers([""], [reader]), OPTIONS)
    with pytest.raises(UserError, match=rf"image {damage.image_id}, .*--on-corrupt skip"):
        list(feed.epoch(damage.view))
    feed.close()
    reader.close()
    reader = CacheReader(store)
    feed = Feed(source, annotations, CachedTeachers([""], [reader]), replace(OPTIONS, skip_corrupt=True))
    seen = []
    for step in feed.epoch(damage.view):
        (part,) = step.parts
        rows = [int(np.flatnonzero((sound.table.image_id == i) & (sound.table.view == damage.view))[0])
                for i in part.image_ids]  # fmt: skip
        (lesson,) = part.lessons
        assert torch.equal(lesson.cached.tokens, sound.read(rows).tokens)
        seen += part.image_ids
    feed.close()
    assert feed.corrupt == {(damage.image_id, damage.view)}
    assert len(seen) == IMAGES
    assert set(seen) == {entry.image_id for entry in annotations.entries} - {damage.image_id}
    reader.close()
    sound.close()


def test_lines_of_the_log(views: FreshViews) -> None:
    """Every second step has a line, of means over two steps: computed by hand from the steps' own numbers."""
    feed = Feed(views, views.annotations, None, OPTIONS)
    steps = [replace(s, waiting_for_images_s=0.1, waiting_for_cache_s=0.3) for s in list(feed.epoch(0))[:2]]
    feed.close()
    assert feed.work.images == IMAGES
    assert feed.work.decoding_s > 0
    progress = Progress(every=2, world_size=2)
    assert progress.line(1, 10, steps[0], step_s=0.5, loss=1.0, lr=1e-3) is None
    assert progress.line(2, 10, steps[1], step_s=0.7, loss=2.0, lr=1e-3) == (
        "step 2/10  loss 1.500  lr 1.00e-03  1.000 s/step  waiting for images 0.100 s, for the cache 0.300 s"
        "  8.0 samples/s"
    )


@pytest.mark.parametrize(
    ("totals", "work", "sentence"),
    [
        (Totals(9, 36, 95.0, 3.0, 2.0), Work(), r"is computing \(95%.*--amp bf16"),
        (
            Totals(9, 36, 60.0, 35.0, 5.0),
            Work(100, 1.0, 4.0),
            r"is decoding \(35%.*10\.0 ms.*40\.0 ms.*raise --workers",
        ),
        (Totals(9, 36, 60.0, 35.0, 5.0), Work(100, 4.0, 1.0), r"is the disk of the images \(35%.*faster disk"),
        (Totals(9, 36, 60.0, 5.0, 35.0), Work(0, 0.0, 0.0, 2.0, 10**8), r"is the disk of the store \(35%.*50 MB/s"),
    ],
)
def test_the_bottleneck_is_named(totals: Totals, work: Work, sentence: str) -> None:
    """Each of the four, of numbers made for it, with a share of the time and advice; and where all cores decode
    already, more workers are not the advice."""
    import re

    assert re.search(sentence, bottleneck(totals, work, workers=2, cores=8))
    assert "raise --workers from" not in bottleneck(totals, work, workers=8, cores=8)
