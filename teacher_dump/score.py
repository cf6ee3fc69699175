"""How good the teacher is by what was stored of it: a wrong normalisation or class map shows here at once.

The predictions of the last decoder layer are read back from the store and evaluated like any detector's. Where a view
is a crop, so is the ground truth: what its window leaves of every box, crowd regions included, in the pixels of the
original image. Views of whole images thus give COCO's own numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import zarr
from pycocotools.coco import COCO

from common.cache.codec import decode_logits
from common.cache.reader import read_manifest
from common.cache.storage import Location, locate
from common.cache.writer import finished_shards, read_skipped, read_table
from common.coco import Annotations
from common.evaluate import CocoMetrics, Result, coco_ap, coco_index, coco_results, detect, ground_truth
from common.records import Augmentation
from teacher_dump.job import augmentation_of

SCORED_SAMPLES = 5000  # at most: as many as COCO's val2017 has; reading their predictions takes seconds


@dataclass(frozen=True)
class Score:
    """The cached teacher's average precision on `samples` samples of view 0."""

    metrics: CocoMetrics
    samples: int
    whole_images: bool

    def __str__(self) -> str:
        seen = "whole images" if self.whole_images else "augmented images and their ground truth"
        return f"the teacher by its cached predictions, on {self.samples} {seen}: {self.metrics}"


def score_store(store: Location, annotations: Annotations, limit: int = SCORED_SAMPLES) -> Score | None:
    """Evaluate the cached predictions of the first `limit` samples of view 0; None if the store has none yet."""
    manifest = read_manifest(store)
    table = read_table(store, manifest)
    readable = finished_shards(store, manifest)[np.arange(len(table)) // manifest.layout.shard_samples]
    readable[read_skipped(store, manifest.layout)] = False
    rows = np.flatnonzero(readable & (table.view == 0))[:limit]
    if not len(rows):
        return None
    augmentations = {int(table.image_id[row]): augmentation_of(table.augmentation[row]) for row in rows}
    truth = view_ground_truth(ground_truth(annotations, augmentations), augmentations)
    by_row = {int(row): int(table.image_id[row]) for row in rows}
    results = list(_results(store, by_row, augmentations, manifest.data.category_ids, manifest.layout.shard_samples))
    whole = all(
        (a.crop_height, a.crop_width) == (entry.height, entry.width)
        for entry in annotations.entries
        if (a := augmentations.get(entry.image_id)) is not None
    )
    return Score(coco_ap(truth, results), len(rows), whole)


def view_ground_truth(truth: COCO, augmentations: Mapping[int, Augmentation]) -> COCO:
    """What one view shows of the ground truth of each image, in the original's pixels; mirroring changes nothing there.

    Boxes are cut at the crop's borders and dropped where nothing is left; areas shrink with their boxes. Annotations of
    whole images stay as they are.
    """
    images = [truth.imgs[image_id] for image_id in augmentations]
    annotations = []
    for image in images:
        for annotation in truth.imgToAnns[image["id"]]:
            seen = _cut(annotation, image, augmentations[image["id"]])
            if seen is not None:
                annotations.append(seen)
    return coco_index({**truth.dataset, "images": images, "annotations": annotations})


def _cut(annotation: dict[str, Any], image: dict[str, Any], a: Augmentation) -> dict[str, Any] | None:
    if (a.crop_height, a.crop_width) == (image["height"], image["width"]):
        return dict(annotation)
    left, top, width, height = annotation["bbox"]
    x0, x1 = max(left, a.crop_left), min(left + width, a.crop_left + a.crop_width)
    y0, y1 = max(top, a.crop_top), min(top + height, a.crop_top + a.crop_height)
    if x1 <= x0 or y1 <= y0:
        return None
    share = (x1 - x0) * (y1 - y0) / (width * height)
    return {**annotation, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": annotation["area"] * share}


def _results(
    store: Location,
    image_ids: Mapping[int, int],
    augmentations: Mapping[int, Augmentation],
    category_ids: tuple[int, ...],
    shard_samples: int,
) -> Iterator[Result]:
    """Detections of each row, read a shard at a time by zarr-python; tokens, the bulk of a store, are not touched."""
    files = locate(store).zarr_store()
    logits, boxes_cxcywh = (zarr.open_array(files, path=name, mode="r") for name in ("logits", "boxes_cxcywh"))
    for shard in sorted({row // shard_samples for row in image_ids}):
        rows = [row for row in image_ids if row // shard_samples == shard]
        span = slice(min(rows), max(rows) + 1)
        last_logits, last_boxes = (torch.from_numpy(np.asarray(array[span])[:, -1]) for array in (logits, boxes_cxcywh))
        for row in rows:
            image_id, index = image_ids[row], row - span.start
            detections = detect(decode_logits(last_logits[index]), last_boxes[index], augmentations[image_id])
            yield from coco_results(image_id, detections, category_ids)
