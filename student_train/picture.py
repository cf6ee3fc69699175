"""What detectors see: some images of a split, a row for the ground truth and one for each detector."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from common.coco import Annotations, check_images, load_annotations
from common.detr.weights import load_detector
from common.devices import choose_device
from common.evaluate import Result
from common.figures import save_figure
from common.images import load_entry
from common.pixel_rule import PixelRule
from common.runtime import log
from student_train.compare import distinct
from student_train.config import PictureConfig
from student_train.evaluate import detect_split, saved_policy

CELL_INCHES = 2.4
SUREST = 3  # detections drawn in an image where none reaches the lowest score


def run_picture(config: PictureConfig) -> None:
    """Run the checkpoints on the first images of a split, and draw what each found."""
    device = choose_device(config.device)
    annotations = load_annotations(config.data, config.split, config.image_folder).decoded_by(PixelRule(config.exif))
    shown = replace(annotations, entries=annotations.entries[: config.images])
    check_images(shown)
    results = []
    for checkpoint in config.checkpoints:
        detector, report = load_detector(checkpoint, data=annotations.categories)
        for line in report.notes:
            log.info(f"{checkpoint}: {line}")
        policy = saved_policy(checkpoint, config.sizes)
        results.append(
            detect_split(detector.placed(device), shown, policy, batch_size=1, workers=1, name=str(checkpoint))
        )
    names = distinct([row_names(checkpoint) for checkpoint in config.checkpoints])
    unsure = draw_detections(shown, list(zip(names, results, strict=True)), config.out, config.min_score)
    for name, images in unsure.items():
        lowest = f"--min-score {config.min_score:g}"
        print(f"{name}: in {images} images nothing reaches {lowest}: their three surest are drawn")


def row_names(checkpoint: Path) -> list[str]:
    """Names for its row in a picture, the shortest first: a run's, or a file's."""
    run, file = checkpoint.resolve().parent.name, checkpoint.stem
    return [run if file in ("best", "last") else file, f"{run}/{file}", str(checkpoint)]


def draw_detections(
    annotations: Annotations,
    results: Sequence[tuple[str, Sequence[Result]]],
    path: Path,
    min_score: float = 0.3,
) -> dict[str, int]:
    """Write a picture: a column for each image, first its ground truth, then what each named detector found.

    results: names, each with detections of the split in COCO's results format. Those below min_score are left out,
    unless none of an image reaches it: then its SUREST are drawn. Returns in how many images that was so, by name.
    """
    entries, rows = annotations.entries, ["ground truth", *(name for name, _ in results)]
    unsure = Counter[str]()
    size = (CELL_INCHES * len(entries), CELL_INCHES * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), len(entries), squeeze=False)
    for column, entry in enumerate(entries):
        pixels = load_entry(annotations, entry).permute(1, 2, 0).numpy()
        for axis in axes[:, column]:
            axis.imshow(pixels)
            axis.set(xticks=[], yticks=[])
        for box_xyxy_px, label in zip(entry.boxes_xyxy_px, entry.labels, strict=True):
            _draw_box(axes[0, column], box_xyxy_px, annotations.class_names[label], int(label))
        for axis, (name, detections) in zip(axes[1:, column], results, strict=True):
            found = [result for result in detections if result["image_id"] == entry.image_id]
            sure = [result for result in found if result["score"] >= min_score]
            unsure[name] += not sure
            for result in sure or sorted(found, key=lambda result: -result["score"])[:SUREST]:
                left, top, width, height = result["bbox"]
                label = annotations.category_ids.index(result["category_id"])
                text = f"{annotations.class_names[label]} {result['score']:.2f}"
                _draw_box(axis, np.array([left, top, left + width, top + height]), text, label)
    for axis, name in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(name)
    save_figure(figure, path, dpi=100)
    return dict(+unsure)


def _draw_box(axis: Axes, box_xyxy_px: npt.NDArray[np.floating], text: str, label: int) -> None:
    x1, y1, x2, y2 = box_xyxy_px.tolist()
    color = f"C{label % 10}"
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.5))
    background = {"facecolor": color, "edgecolor": color, "pad": 0.5}
    axis.text(x1, y1, text, fontsize=5, color="white", bbox=background, clip_on=True)
