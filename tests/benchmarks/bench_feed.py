"""Decoding and replaying images: threads of the training process against the workers of torch's DataLoader.

The cases of one and of two workers, on images of 640 x 480 drawn here and on the recipe's augmentation, give the same
padded batches. The `scaling` case is two threads against one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from common.augment import TRAIN_POLICY
from common.coco import Annotations, load_annotations
from common.images import collate
from common.records import Batch
from student_train.feed import Feed, FeedOptions, FreshViews, replay
from tests.benchmarks import Case

IMAGES, BATCH = 32, 4


class Replays(Dataset[object]):
    """What a DataLoader would be given."""

    def __init__(self, source: FreshViews, order: list[int]) -> None:
        self._source, self._order = source, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, number: int) -> object:
        replayed = replay(self._source.sample(0, self._order[number]), self._source.annotations)
        return replayed.image, replayed.targets


def cases() -> Iterator[Case]:
    source = FreshViews(_images(Path(tempfile.mkdtemp(prefix="bench-feed-"))), TRAIN_POLICY, seed=0)
    options = FeedOptions(batch_size=BATCH, seed=0, prefetch=2)
    feeds = {workers: Feed(source, source.annotations, None, replace(options, workers=workers)) for workers in (1, 2)}
    order = feeds[1].order(0).tolist()
    unit = f"{IMAGES} images of 640 x 480 to batches of {BATCH}"
    for workers, feed in feeds.items():
        loader: DataLoader[object] = DataLoader(
            Replays(source, order),
            batch_size=BATCH,
            num_workers=workers,
            collate_fn=_collate,
            prefetch_factor=2,
            persistent_workers=True,
        )
        name = f"feed, {workers} threads / DataLoader, {workers} workers"
        yield Case(name, partial(_through_feed, feed), partial(_through_loader, loader), unit, runs=5)
    yield Case("feed, scaling: 2 threads / 1", *(partial(_through_feed, feeds[n]) for n in (2, 1)), unit, runs=5)


def _through_feed(feed: Feed) -> int:
    return sum(len(step.image_ids) for step in feed.epoch(0))


def _through_loader(loader: DataLoader[object]) -> int:
    return sum(len(batch.images) for batch in loader)  # type: ignore[attr-defined]


def _collate(samples: list[object]) -> Batch:
    return collate(samples)  # type: ignore[arg-type]


def _images(folder: Path) -> Annotations:
    """JPEGs of smoothed noise, about as many bytes as COCO's: 180 kB."""
    for image_id in range(IMAGES):
        noise = torch.rand(1, 3, 120, 160, generator=torch.Generator().manual_seed(image_id))
        fine = torch.rand(1, 3, 480, 640, generator=torch.Generator().manual_seed(image_id + IMAGES))
        smooth = torch.nn.functional.interpolate(noise, (480, 640), mode="bicubic").clamp(0, 1)
        pixels = ((0.85 * smooth + 0.15 * fine)[0].permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{image_id}.jpg", quality=90)
    (folder / "annotations").mkdir()
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(IMAGES)],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{"image_id": i, "category_id": 1, "bbox": [10, 10, 290, 290]} for i in range(IMAGES)],
    }
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return load_annotations(folder, "train", folder)
