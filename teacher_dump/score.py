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
import numpy.typing as npt
from pycocotools.coco import COCO

from common.cache.codec import decode_logits
from common.cache.reader import CacheReader
from common.cache.storage import Location
from common.coco import Annotations
from common.evaluate import CocoMetrics, Result, coco_ap, coco_index, coco_results, detect, ground_truth
from common.finite import check_finite
from common.records import Augmentation
from teacher_dump.job import augmentation_of

ROWS_AT_ONCE = 64
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
    """Evaluate the cached predictions of the first `limit` samples of view 0; None if the store has none yet.

    CorruptRecord or OutOfReach where they cannot be read.
    """
    reader = CacheReader(store)
    reader.choose_fields({"logits", "boxes_cxcywh"})  # tokens, the bulk of a store, are not read
    table, rows = reader.table, reader.rows(view=0)[:limit]
    if not len(rows):
        return None
    augmentations = {int(table.image_id[row]): augmentation_of(table.augmentation[row]) for row in rows}
    truth = view_ground_truth(ground_truth(annotations, augmentations), augmentations)
    results = list(_results(reader, rows, augmentations))
    reader.close()
    whole = all(
        (a.crop_height, a.crop_width) == (truth.imgs[image_id]["height"], truth.imgs[image_id]["width"])
        for image_id, a in augmentations.items()
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
    reader: CacheReader, rows: npt.NDArray[np.intp], augmentations: Mapping[int, Augmentation]
) -> Iterator[Result]:
    """Detections of each row by the last decoder layer."""
    for some in np.array_split(rows, -(-len(rows) // ROWS_AT_ONCE)):
        batch = reader.read(some)
        logits, boxes_cxcywh = decode_logits(batch.logits[:, -1]), batch.boxes_cxcywh[:, -1]
        image_ids = reader.table.image_id[some].tolist()
        check_finite({"logits": logits, "boxes_cxcywh": boxes_cxcywh}, image_ids, f"the teacher of {reader.path}")
        for index, image_id in enumerate(image_ids):
            detections = detect(logits[index], boxes_cxcywh[index], augmentations[image_id])
            yield from coco_results(image_id, detections, reader.manifest.data.category_ids)
