"""From a detector's outputs to COCO's average precision, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from common.boxes import cxcywh_to_xyxy
from common.coco import Annotations
from common.errors import UserError
from common.files import write_text
from common.records import Augmentation

DETECTIONS_PER_IMAGE = 100
Result = dict[str, Any]  # one detection as COCO's results json has it: image_id, category_id, bbox (xywh, px), score


@dataclass(frozen=True)
class CocoMetrics:
    """pycocotools' twelve numbers, in 0..1, or -1 where there is no such ground truth, and the AP of each class.

    AP is averaged over IoU thresholds .50 to .95, ap50 and ap75 are at one threshold; small, medium and large objects
    are below 32^2, below 96^2 and above; ar_N is the recall with at most N detections per image. class_ap: by name, of
    the classes that occur.
    """

    class_ap: dict[str, float]
    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar_1: float
    ar_10: float
    ar_100: float
    ar_small: float
    ar_medium: float
    ar_large: float

    def __str__(self) -> str:
        names = {"AP": self.ap, "AP50": self.ap50, "AP75": self.ap75}
        names |= {"APs": self.ap_small, "APm": self.ap_medium, "APl": self.ap_large, "AR100": self.ar_100}
        return "  ".join(f"{name} {100 * value:.1f}" if value >= 0 else f"{name} -" for name, value in names.items())


@dataclass(frozen=True)
class Detections:
    """Of one image: boxes_xyxy_px (N, 4) in its original pixels, scores (N,) in 0..1 descending, labels (N,) int64."""

    boxes_xyxy_px: Tensor
    scores: Tensor
    labels: Tensor


def detect(
    logits: Tensor, boxes_cxcywh: Tensor, augmentation: Augmentation, limit: int = DETECTIONS_PER_IMAGE
) -> Detections:
    """The highest sigmoid scores over all (query, class) pairs, as Deformable DETR's post-processing has it.

    logits: (Q, K) with K the data set's classes (`common.coco.output_columns` selects them from a model of 91 outputs).
    boxes_cxcywh: (Q, 4), relative to the augmented image; they go back through mirror, resize and crop to the pixels
    of the original, and are not clipped. A query can appear with several classes.
    """
    classes = logits.shape[-1]
    scores, pairs = logits.float().sigmoid().flatten().topk(min(limit, logits.numel()))
    queries = pairs.div(classes, rounding_mode="floor")
    return Detections(original_boxes(boxes_cxcywh[queries], augmentation), scores, pairs % classes)


def original_boxes(boxes_cxcywh: Tensor, augmentation: Augmentation) -> Tensor:
    """Boxes (..., 4) relative to the augmented image -> corners in pixels of the original one."""
    a = augmentation
    cx, cy, width, height = boxes_cxcywh.float().unbind(-1)
    relative = cxcywh_to_xyxy(torch.stack((1 - cx if a.flip else cx, cy, width, height), dim=-1))
    size = relative.new_tensor([a.crop_width, a.crop_height, a.crop_width, a.crop_height])
    offset = relative.new_tensor([a.crop_left, a.crop_top, a.crop_left, a.crop_top])
    return relative * size + offset


def coco_results(image_id: int, detections: Detections, category_ids: Sequence[int]) -> list[Result]:
    """One image's detections in COCO's results format; category_ids: of each class index."""
    boxes_xywh_px = detections.boxes_xyxy_px.clone()
    boxes_xywh_px[:, 2:] -= boxes_xywh_px[:, :2]
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": bbox, "score": score}
        for label, bbox, score in zip(
            detections.labels.tolist(), boxes_xywh_px.tolist(), detections.scores.tolist(), strict=True
        )
    ]


def ground_truth(annotations: Annotations, image_ids: Iterable[int] | None = None) -> COCO:
    """pycocotools' index of the annotations, crowd regions included, for any number of evaluations.

    image_ids: of these images, by default all. Annotations are numbered from 1, because pycocotools takes a match with
    annotation 0 for no match.
    """
    entries = annotations.entries
    if image_ids is not None:
        entries = entries[np.isin(entries.image_ids, list(image_ids))]
    truth, ids = annotations.truth, annotations.category_ids
    found: list[dict[str, Any]] = []
    for image_id, (start, end) in zip(entries.image_ids.tolist(), entries.box_bounds.tolist(), strict=True):
        columns = (truth.labels, truth.boxes_xywh_px, truth.areas_px, truth.crowd)
        for label, bbox, area, crowd in zip(*(column[start:end].tolist() for column in columns), strict=True):
            found.append(
                {
                    "id": len(found) + 1,
                    "image_id": image_id,
                    "category_id": ids[label],
                    "bbox": bbox,
                    "area": area,
                    "iscrowd": int(crowd),
                }
            )
    sizes = zip(entries.image_ids.tolist(), entries.sizes.tolist(), strict=True)
    images = [{"id": image_id, "width": width, "height": height} for image_id, (width, height) in sizes]
    categories = [{"id": i, "name": name} for i, name in sorted(zip(ids, shown_names(annotations), strict=True))]
    return coco_index({"images": images, "annotations": found, "categories": categories})


def shown_names(annotations: Annotations) -> list[str]:
    """A name for each class that no other has: those that share one have their category id behind it."""
    names = annotations.class_names
    ids = annotations.category_ids
    return [n if names.count(n) == 1 else f"{n} (category {i})" for i, n in zip(ids, names, strict=True)]


def coco_ap(truth: COCO, results: Iterable[Result], image_ids: Sequence[int] | None = None) -> CocoMetrics:
    """Evaluate detections on the given images, or on all of the ground truth.

    An image without detections counts as one where nothing was found. Raises UserError where a detection is of an
    image that the ground truth does not have.
    """
    found = [dict(result) for result in results]  # pycocotools writes into them
    unknown = {result["image_id"] for result in found} - truth.imgs.keys()
    if unknown:
        raise UserError(
            f"expected detections of images in the ground truth, found {len(unknown)} other images, the first is "
            f"{min(unknown)}: evaluate on the split that was detected"
        )
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(
            truth, truth.loadRes(found) if found else coco_index({**truth.dataset, "annotations": []}), "bbox"
        )
        if image_ids is not None:
            evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers: list[Any] = evaluation.stats.tolist()
    return CocoMetrics(_class_ap(evaluation), *numbers)


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Write detections as COCO's results json; the file appears complete or not at all."""
    write_text(path, json.dumps(list(results)))


def coco_index(dataset: dict[str, Any]) -> COCO:
    """pycocotools' index of a parsed json whose annotations all have an id, an area and a crowd flag."""
    index = COCO()
    index.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        index.createIndex()
    return index


def _class_ap(evaluation: COCOeval) -> dict[str, float]:
    precision = evaluation.eval["precision"][..., 0, -1]  # (thresholds, recalls, classes), all areas, most detections
    names = [category["name"] for category in evaluation.cocoGt.loadCats(evaluation.params.catIds)]
    means = (precision[:, :, index] for index in range(len(names)))
    return {name: float(np.mean(values)) for name, values in zip(names, means, strict=True) if values.max() > -1}
