"""The annotation index of a COCO-format data set.

    data/
      annotations/instances_<split>.json
      <split>/*.jpg

Classes are 0..K-1 in ascending order of category id, whatever the ids are (COCO's own go from 1 to 90 with gaps).
Only the json is read here, no image is opened. The evaluation reads the json itself, crowd regions included, through
pycocotools (`common.evaluate`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.records import ImageEntry

Objects = list[dict[str, Any]]  # the json's images, annotations or categories
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Annotations:
    """All images of one split and what is in them.

    entries: every image of the json, sorted by image id, those without annotations included; the boxes of an image are
    in the order of the json. category_ids: the category id of each class index, ascending. class_names: likewise.
    sha256: of the json file's bytes, in hexadecimal: the identity of the annotations.
    """

    entries: tuple[ImageEntry, ...]
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    annotation_file: Path
    image_folder: Path
    sha256: str

    @property
    def num_classes(self) -> int:
        return len(self.category_ids)

    def image_path(self, entry: ImageEntry) -> Path:
        return self.image_folder / entry.file_name

    def only_annotated(self) -> Annotations:
        """The same without the images that have no box to learn from."""
        return replace(self, entries=tuple(entry for entry in self.entries if len(entry.labels)))


def load_annotations(data: Path, split: str) -> Annotations:
    """Read data/annotations/instances_<split>.json.

    Crowd regions are left out, boxes are clipped to their image, and those left empty are dropped.

    Raises UserError where the layout, the json, or a reference within it is broken.
    """
    annotation_file, image_folder = data / "annotations" / f"instances_{split}.json", data / split
    for path, there in ((annotation_file, annotation_file.is_file()), (image_folder, image_folder.is_dir())):
        if not there:
            raise UserError(
                f"expected {data}/{split}/*.jpg and {data}/annotations/instances_{split}.json, but {path} does not "
                "exist: name the data set with --data and the split with --split (`make demo` needs no data)"
            )
    try:
        content, sha256 = _read_json(annotation_file)
        image_ids, file_names, sizes = _read_images(_section(content, "images"))
        category_ids, class_names = _read_categories(_section(content, "categories"))
        rows, labels, boxes_xyxy_px = _read_boxes(_section(content, "annotations"), image_ids, sizes, category_ids)
    except UserError as error:
        raise UserError(f"{annotation_file}: {error}") from None

    # One array holds all boxes, an entry a view of its rows: a million small arrays would cost ten times the memory.
    bounds = np.searchsorted(rows, np.arange(len(image_ids) + 1)).tolist()
    entries = tuple(
        ImageEntry(image_id, file_name, width, height, boxes_xyxy_px[start:end], labels[start:end])
        for image_id, file_name, (width, height), start, end in zip(
            image_ids.tolist(), file_names, sizes.tolist(), bounds[:-1], bounds[1:], strict=True
        )
    )
    return Annotations(entries, category_ids, class_names, annotation_file, image_folder, sha256)


def missing_images(annotations: Annotations) -> list[str]:
    """File names of the index that are not in the image folder, found by listing it once."""
    folder = annotations.image_folder
    with os.scandir(folder) as listing:
        present = {item.name for item in listing}
    names = (entry.file_name for entry in annotations.entries)
    return [name for name in names if name not in present and not ("/" in name and (folder / name).is_file())]


def check_images(annotations: Annotations) -> None:
    """Raise UserError, with the count and the first name, where image files are missing."""
    missing = missing_images(annotations)
    if missing:
        raise UserError(
            f"expected {len(annotations.entries)} images in {annotations.image_folder}, but {len(missing)} are "
            f"missing, the first is {missing[0]}: add them, or remove them from {annotations.annotation_file}"
        )


def output_columns(category_ids: Sequence[int], outputs: int) -> tuple[int, ...]:
    """Which of a model's class outputs answers for each class index: `logits[..., output_columns(...)]` has K columns.

    Two conventions are in use for the same data: one output per class (80 for COCO: MMDetection, and this project), and
    the category id itself as index (91 for COCO: the official DETR and Deformable DETR, transformers). Raises
    UserError for any other number of outputs.
    """
    if outputs == len(category_ids):
        return tuple(range(outputs))
    if outputs == max(category_ids) + 1:
        return tuple(category_ids)
    raise UserError(
        f"expected a model of {len(category_ids)} class outputs (one per category) or {max(category_ids) + 1} (one per "
        f"category id), found {outputs}: use a checkpoint trained on the same categories"
    )


def _read_json(annotation_file: Path) -> tuple[Any, str]:
    """The parsed file without its segmentations, and its sha256."""
    data = annotation_file.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        text = data.decode()
        del data  # half a gigabyte in COCO's case, as is the text
        return json.loads(text, object_hook=without_segmentation), sha256
    except ValueError as error:  # broken json, or bytes that are no text
        raise UserError(f"expected json, found: {error}; is the file complete?") from None


def without_segmentation(node: dict[str, Any]) -> dict[str, Any]:
    """For `json.loads(object_hook=...)`: polygons are dropped as soon as they are parsed."""
    # Polygons are nine tenths of COCO's json and never pile up in memory.
    node.pop("segmentation", None)
    return node


def _section(content: Any, key: str) -> Objects:
    section = content.get(key) if isinstance(content, dict) else None
    if not isinstance(section, list) or not all(isinstance(item, dict) for item in section):
        raise UserError(f"expected a list of objects named '{key}': is it an 'instances' file?")
    if not section and key != "annotations":
        raise UserError(f"expected {key}, found an empty list")
    return section


def _column(items: Objects, key: str) -> list[Any]:
    try:
        return [item[key] for item in items]
    except KeyError:
        first = next(item for item in items if key not in item)
        raise UserError(f"expected '{key}' in every object, not found in {str(first)[:80]}") from None


def _integers(items: Objects, key: str) -> Integers:
    values = _column(items, key)
    for value in values:  # numpy would quietly convert a string, a float or a truth value
        if type(value) is not int:
            raise UserError(f"expected '{key}' to be a whole number everywhere, found {value!r}")
    return np.array(values, dtype=np.int64)


def _check_unique(values: Sequence[object], what: str) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise UserError(f"expected every {what} once, found {len(repeated)} repeated, the first is {repeated[0]}")


def _read_images(images: Objects) -> tuple[Integers, list[str], Integers]:
    """Image ids (N,) ascending, file names, and sizes (N, 2) as width, height."""
    ids = _integers(images, "id")
    sizes = np.stack((_integers(images, "width"), _integers(images, "height")), axis=1)
    file_names = [str(name) for name in _column(images, "file_name")]
    _check_unique(ids.tolist(), "image id")
    _check_unique(file_names, "file name")
    for file_name, size in zip(file_names, sizes.tolist(), strict=True):
        if min(size) <= 0:
            raise UserError(f"expected a width and height above 0, found {size[0]} x {size[1]} for {file_name}")
    order = np.argsort(ids)
    return ids[order], [file_names[i] for i in order.tolist()], sizes[order]


def _read_categories(categories: Objects) -> tuple[tuple[int, ...], tuple[str, ...]]:
    ids = _integers(categories, "id").tolist()
    _check_unique(ids, "category id")
    if min(ids) < 0:
        raise UserError(f"expected category ids of 0 and above, found {min(ids)}")
    names = dict(zip(ids, (str(category.get("name", category["id"])) for category in categories), strict=True))
    return tuple(sorted(ids)), tuple(names[i] for i in sorted(ids))


def _read_boxes(
    annotations: Objects, image_ids: Integers, sizes: Integers, category_ids: tuple[int, ...]
) -> tuple[Integers, Integers, npt.NDArray[np.float32]]:
    """Of each box that is kept: its image's row (N,) ascending, class index (N,) and clipped corners (N, 4)."""
    rows = _positions(_integers(annotations, "image_id"), image_ids, "image")
    labels = _positions(_integers(annotations, "category_id"), np.array(category_ids), "category")
    try:
        boxes_xywh_px = np.array(_column(annotations, "bbox"), dtype=np.float64).reshape(len(annotations), 4)
    except (ValueError, TypeError):
        raise UserError("expected four numbers as every 'bbox'") from None
    if not np.isfinite(boxes_xywh_px).all():
        raise UserError("expected four finite numbers as every 'bbox', found an infinite one or NaN")

    corners = np.concatenate((boxes_xywh_px[:, :2], boxes_xywh_px[:, :2] + boxes_xywh_px[:, 2:]), axis=1)
    boxes_xyxy_px = np.clip(corners, 0, np.tile(sizes[rows], 2)).astype(np.float32)
    crowd = np.array([annotation.get("iscrowd", 0) for annotation in annotations], dtype=bool)
    kept = np.flatnonzero(~crowd & (boxes_xyxy_px[:, 2:] > boxes_xyxy_px[:, :2]).all(axis=1))
    kept = kept[np.argsort(rows[kept], kind="stable")]
    return rows[kept], labels[kept], boxes_xyxy_px[kept]


def _positions(values: Integers, ascending: Integers, what: str) -> Integers:
    """Index of each value among the ascending ones; UserError where it is not there."""
    found = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1).astype(np.int64)
    unknown = values[ascending[found] != values]
    if len(unknown):
        raise UserError(
            f"expected annotations of listed {what} ids only, found {len(unknown)} of others, the first of {unknown[0]}"
        )
    return found
