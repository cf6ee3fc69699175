"""Where the teacher looks: how much more the feature loss weighs tokens inside ground-truth boxes than others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.boxes import cxcywh_to_xyxy
from common.cache.reader import CacheReader
from common.cache.storage import Location
from common.coco import Annotations
from common.records import CachedBatch
from common.replay import apply_boxes
from teacher_dump.job import augmentation_of

SAMPLES = 200  # at most: the ratio hardly moves with more, and reading their weights takes a second


@dataclass(frozen=True)
class InsideRatio:
    """ratios: for each level, the mean weight of tokens whose centre is in a box over that of the others; NaN or
    infinite where one of the two has no token or no weight."""

    ratios: tuple[float, ...]
    strides: tuple[int, ...]
    samples: int

    def __str__(self) -> str:
        ratios = ", ".join(f"{ratio:.2f}" if np.isfinite(ratio) else "-" for ratio in self.ratios)
        return (
            f"the weight map by ground truth, on {self.samples} samples: a token inside a box weighs {ratios} times"
            f" one outside, at strides {', '.join(map(str, self.strides))}"
        )


def inside_ratio(store: Location, annotations: Annotations, limit: int = SAMPLES) -> InsideRatio | None:
    """Over the first `limit` samples of view 0; None if the store has none yet.

    Where a store keeps some tokens only, sums of their weights W / pi are those of all tokens on average. CorruptRecord
    or OutOfReach where they cannot be read.
    """
    reader = CacheReader(store)
    reader.choose_fields({"token_positions", "token_weights"})  # features, the bulk of a store, are not read
    table, teacher, rows = reader.table, reader.manifest.teacher, reader.rows(view=0)[:limit]
    if not len(rows):
        return None
    record = reader.read(rows)  # of COCO some 35 MB
    reader.close()
    weight, tokens = np.zeros((2, 2, len(teacher.strides)))  # each (outside, inside) by level
    for index, row in enumerate(rows.tolist()):
        augmentation = augmentation_of(table.augmentation[row])
        boxes_cxcywh = apply_boxes(annotations.entries.of_image(int(table.image_id[row])), augmentation).boxes_cxcywh
        boxes_xyxy = cxcywh_to_xyxy(boxes_cxcywh).numpy()
        height, width = teacher.input_size or (augmentation.height, augmentation.width)
        levels = level_weights(record, index, table.level_shapes[row])
        for level, (weights, stride) in enumerate(zip(levels, teacher.strides, strict=True)):
            y, x = (np.arange(weights.shape[0]) + 0.5) * stride, (np.arange(weights.shape[1]) + 0.5) * stride
            inside = _inside(y / height, x / width, boxes_xyxy)
            weight[:, level] += np.nansum(weights[~inside]), np.nansum(weights[inside])
            tokens[:, level] += (~inside).sum(), inside.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        outside, within = weight / tokens
        ratios = within / outside
    return InsideRatio(tuple(ratios.tolist()), teacher.strides, len(rows))


def level_weights(batch: CachedBatch, index: int, shapes: npt.NDArray[np.integer]) -> list[npt.NDArray[np.float32]]:
    """The stored weights of a batch's sample, (h, w) for each level's shape, NaN where a token was not kept."""
    sizes = shapes.prod(axis=1)
    weights = np.full(int(sizes.sum()), np.nan, dtype=np.float32)
    kept = slice(*batch.token_offsets[index : index + 2].tolist())
    weights[batch.token_positions[kept].numpy()] = batch.token_weights[kept].numpy()
    parts = np.split(weights, np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _inside(
    y: npt.NDArray[np.float64], x: npt.NDArray[np.float64], boxes_xyxy: npt.NDArray[np.float32]
) -> npt.NDArray[np.bool_]:
    """(h, w): whether the point at y (h,), x (w,) is in one of the boxes (N, 4); all in fractions of the image."""
    left, top, right, bottom = boxes_xyxy.T[:, :, None]
    rows, columns = (top <= y) & (y <= bottom), (left <= x) & (x <= right)  # (N, h), (N, w)
    inside: npt.NDArray[np.bool_] = (rows[:, :, None] & columns[:, None, :]).any(axis=0)
    return inside
