"""A picture of one record: what the teacher saw, what it said, and which tokens of it were kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.boxes import cxcywh_to_xyxy
from common.cache.codec import decode_logits
from common.cache.reader import CacheReader
from common.coco import load_annotations
from common.errors import UserError
from common.figures import save_figure
from common.images import load_entry
from common.pixel_rule import rule_of_store
from common.records import Augmentation, CachedBatch, ImageEntry
from common.replay import apply_boxes, apply_image
from teacher_dump.job import augmentation_of
from teacher_dump.weight_map import level_weights

PREDICTIONS = 10  # drawn at most, the surest first
LEAST_SCORE = 0.3  # of the predictions drawn; where none reaches it, the three surest are


def draw_sample(reader: CacheReader, data: Path, image_folder: Path | None, image_id: int, view: int, out: Path) -> str:
    """Draw one sample to a PNG file; says what is to be seen. UserError if the store does not have it."""
    found = np.flatnonzero((reader.table.image_id == image_id) & (reader.table.view == view))
    if not len(found):
        have = f"{reader.manifest.views.views} views of images such as {', '.join(map(str, reader.table.image_id[:3]))}"
        raise UserError(f"{reader.path} has no image {image_id} with view {view}; it has {have}")
    row = int(found[0])
    if row not in reader.rows():
        raise UserError(
            f"the record of image {image_id}, view {view} is not there: its shard is missing or it was skipped"
        )
    rule = rule_of_store(reader.path, reader.manifest.views.exif, None)
    annotations = load_annotations(data, reader.manifest.data.split, image_folder).decoded_by(rule)
    try:
        entry = annotations.entries.of_image(image_id)
    except KeyError:
        raise UserError(
            f"{annotations.annotation_file} has no image {image_id}; name the data that was dumped with --data"
        ) from None
    augmentation = augmentation_of(reader.table.augmentation[row])
    image = apply_image(load_entry(annotations, entry), augmentation)
    record = reader.read([row])
    names = reader.manifest.data.class_names
    levels = level_weights(record, 0, reader.table.level_shapes[row])
    total = max(float(sum(map(np.nansum, levels))), 1e-30)

    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    columns = 1 + len(levels)
    height_in = 4.2 * augmentation.height / augmentation.width + 0.8
    figure, axes = plt.subplots(1, columns, figsize=(4.2 * columns, height_in), layout="constrained", squeeze=False)
    shown = image.permute(1, 2, 0).numpy()
    _draw_boxes(axes[0, 0], shown, record, entry, augmentation, names)
    teacher = reader.manifest.teacher
    seen_height, seen_width = teacher.input_size or shown.shape[:2]
    for axis, level, stride in zip(axes[0, 1:], levels, teacher.strides, strict=True):
        cell_px = (stride * shown.shape[0] / seen_height, stride * shown.shape[1] / seen_width)
        _draw_level(axis, shown, level, float(np.nansum(level)) / total, cell_px)
        axis.set_title(f"stride {stride}: {axis.get_title()}", fontsize=9)
    figure.suptitle(f"image {image_id}, view {view}, {reader.manifest.teacher.name}", fontsize=11)
    save_figure(figure, out, dpi=110)
    plt.close(figure)
    kept, tokens = len(record.token_weights), int(reader.table.level_shapes[row].prod(axis=1).sum())
    return (
        f"{out}: image {image_id}, view {view}, {augmentation.width} x {augmentation.height} pixels, {kept} of {tokens}"
        " tokens kept; the teacher's boxes, then the weight map level by level, dots on the kept tokens"
    )


def _draw_boxes(
    axis: Any,
    image: npt.NDArray[np.uint8],
    record: CachedBatch,
    entry: ImageEntry,
    augmentation: Augmentation,
    names: tuple[str, ...],
) -> None:
    targets = apply_boxes(entry, augmentation)
    scores, labels = decode_logits(record.logits[0, -1]).float().sigmoid().max(dim=-1)
    surest = scores.argsort(descending=True)
    sure = int((scores >= LEAST_SCORE).sum())
    surest = surest[: min(PREDICTIONS, max(3, sure))]
    axis.imshow(image)
    _outline(axis, image, targets.boxes_cxcywh, [names[label] for label in targets.labels.tolist()], "lime", "--")
    texts = [f"{names[int(labels[query])]} {scores[query]:.2f}" for query in surest.tolist()]
    _outline(axis, image, record.boxes_cxcywh[0, -1][surest], texts, "red", "-")
    axis.set_title(f"{len(targets.labels)} annotated (green), {len(surest)} predicted (red)", fontsize=9)
    axis.axis("off")


def _outline(
    axis: Any, image: npt.NDArray[np.uint8], boxes_cxcywh: Tensor, texts: list[str], colour: str, style: str
) -> None:
    height, width = image.shape[:2]
    boxes_xyxy_px = cxcywh_to_xyxy(boxes_cxcywh.float()) * torch.tensor([width, height, width, height])
    for (left, top, right, bottom), text in zip(boxes_xyxy_px.tolist(), texts, strict=True):
        axis.plot([left, right, right, left, left], [top, top, bottom, bottom, top], style, color=colour, linewidth=1.5)
        axis.text(
            left, top, text, fontsize=7, color="black", va="bottom", bbox={"facecolor": colour, "pad": 0.5, "lw": 0}
        )
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)


def _draw_level(
    axis: Any,
    image: npt.NDArray[np.uint8],
    weights: npt.NDArray[np.float32],
    share: float,
    cell_px: tuple[float, float],
) -> None:
    """weights (h, w) of one level, NaN where a token was not kept. share: of the sample's weight that lies here.
    cell_px: height and width of a token on the image."""
    (height, width), (cell_height, cell_width) = weights.shape, cell_px
    axis.imshow(image.mean(axis=2), cmap="gray", vmin=0, vmax=255)
    extent = (0, width * cell_width, height * cell_height, 0)
    axis.imshow(weights, cmap="inferno", alpha=0.6, vmin=0, extent=extent, interpolation="nearest")
    kept_rows, kept_columns = np.nonzero(~np.isnan(weights))
    if kept_rows.size < weights.size:
        dot = max(2.0, min(40.0, 4000 / weights.size))
        axis.scatter((kept_columns + 0.5) * cell_width, (kept_rows + 0.5) * cell_height, dot, "cyan", linewidths=0)
    axis.set_xlim(0, image.shape[1])
    axis.set_ylim(image.shape[0], 0)
    axis.set_title(f"{kept_rows.size} of {weights.size} tokens, {share:.0%} of the weight")
    axis.axis("off")
