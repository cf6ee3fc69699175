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
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.json_stream import Objects, UnexpectedKind, read_lists
from common.pixel_rule import PixelRule
from common.records import ImageEntry

Integers = npt.NDArray[np.int64]
Columns = tuple[npt.NDArray[Any], ...]


@dataclass(frozen=True)
class Annotations:
    """All images of one split and what is in them.

    entries: every image of the json, sorted by image id, those without annotations included; the boxes of an image are
    in the order of the json. category_ids: the category id of each class index, ascending. class_names: likewise.
    sha256: of the json file's bytes, in hexadecimal: the identity of the annotations. rule: how its images are decoded.
    """

    entries: tuple[ImageEntry, ...]
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    annotation_file: Path
    image_folder: Path
    sha256: str
    rule: PixelRule = field(default_factory=PixelRule)

    @property
    def num_classes(self) -> int:
        return len(self.category_ids)

    def image_path(self, entry: ImageEntry) -> Path:
        return self.image_folder / entry.file_name

    def decoded_by(self, rule: PixelRule) -> Annotations:
        """The same with another rule for their images."""
        return replace(self, rule=rule)

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
        found, sha256 = _read_json(annotation_file)
        image_ids, file_names, sizes = _checked_images(*found.pop("images"))
        category_ids, class_names = _checked_categories(*found.pop("categories"))
        rows, labels, boxes_xyxy_px = _checked_boxes(
            *found.pop("annotations"), image_ids=image_ids, sizes=sizes, category_ids=category_ids
        )
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


def _read_json(annotation_file: Path) -> tuple[dict[str, Columns], str]:
    """What is needed of the file's images, categories and annotations, as columns, and its sha256.

    The file is read in pieces, and of its polygons, nine tenths of COCO's json, nothing stays.
    """
    columns_of = {"images": _image_columns, "categories": _category_columns, "annotations": _box_columns}
    blocks: dict[str, list[Columns]] = {name: [] for name in columns_of}
    digest = hashlib.sha256()
    with annotation_file.open("rb", buffering=0) as file:

        def read(size: int) -> bytes:
            data = file.read(size)
            digest.update(data)
            return data

        try:
            for name, objects in read_lists(read, columns_of, unread="segmentation"):
                blocks[name].append(columns_of[name](objects))
        except UnexpectedKind as error:
            raise _not_instances(str(error) or "images") from None
        except ValueError as error:  # broken json, or bytes that are no text
            raise UserError(f"expected json, found: {error}; is the file complete?") from None
    for name in ("images", "categories", "annotations"):
        if not blocks[name]:
            raise _not_instances(name)
        if not len(blocks[name][0][0]) and name != "annotations":
            raise UserError(f"expected {name}, found an empty list")
    return {name: _joined(found) for name, found in blocks.items()}, digest.hexdigest()


def _joined(blocks: list[Columns]) -> Columns:
    """Each column of all blocks in one array. The blocks are let go of on the way: there is memory for them once."""
    columns = [list(parts) for parts in zip(*blocks, strict=True)]
    blocks.clear()
    return tuple(np.concatenate(columns.pop(0)) for _ in range(len(columns)))


def _not_instances(name: str) -> UserError:
    return UserError(f"expected a list of objects named '{name}': is it an 'instances' file?")


def without_segmentation(node: dict[str, Any]) -> dict[str, Any]:
    """For `json.loads(object_hook=...)`: polygons are dropped as soon as they are parsed."""
    # Polygons are nine tenths of COCO's json and never pile up in memory.
    node.pop("segmentation", None)
    return node


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


def _image_columns(images: Objects) -> Columns:
    """Ids (N,), file names (N,), and sizes (N, 2) as width, height."""
    sizes = np.stack((_integers(images, "width"), _integers(images, "height")), axis=1)
    return _integers(images, "id"), np.array([str(name) for name in _column(images, "file_name")], dtype=object), sizes


def _category_columns(categories: Objects) -> Columns:
    """Ids (N,) and names (N,)."""
    ids = _integers(categories, "id")
    return ids, np.array([str(category.get("name", category["id"])) for category in categories], dtype=object)


def _box_columns(annotations: Objects) -> Columns:
    """Image ids (N,), category ids (N,), boxes (N, 4) that are not clipped, and whether crowd (N,)."""
    try:
        boxes_xywh_px = np.array(_column(annotations, "bbox"), dtype=np.float64).reshape(len(annotations), 4)
    except (ValueError, TypeError):
        raise UserError("expected four numbers as every 'bbox'") from None
    if not np.isfinite(boxes_xywh_px).all():
        raise UserError("expected four finite numbers as every 'bbox', found an infinite one or NaN")
    crowd = np.array([annotation.get("iscrowd", 0) for annotation in annotations], dtype=bool)
    corners = np.concatenate((boxes_xywh_px[:, :2], boxes_xywh_px[:, :2] + boxes_xywh_px[:, 2:]), axis=1)
    # Rounded before they are clipped, which gives the same: an image's sides are exact in float32.
    boxes_xyxy_px = corners.astype(np.float32)
    return _integers(annotations, "image_id"), _integers(annotations, "category_id"), boxes_xyxy_px, crowd


def _check_unique(values: Sequence[object], what: str) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise UserError(f"expected every {what} once, found {len(repeated)} repeated, the first is {repeated[0]}")


def _checked_images(ids: Integers, names: npt.NDArray[Any], sizes: Integers) -> tuple[Integers, list[str], Integers]:
    """Image ids (N,) ascending, file names, and sizes (N, 2) as width, height."""
    _check_unique(ids.tolist(), "image id")
    _check_unique(names.tolist(), "file name")
    for row in np.flatnonzero(sizes.min(axis=1) <= 0).tolist():
        width, height = sizes[row].tolist()
        raise UserError(f"expected a width and height above 0, found {width} x {height} for {names[row]}")
    order = np.argsort(ids)
    return ids[order], names[order].tolist(), sizes[order]


def _checked_categories(ids: Integers, names: npt.NDArray[Any]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    _check_unique(ids.tolist(), "category id")
    if ids.min() < 0:
        raise UserError(f"expected category ids of 0 and above, found {ids.min()}")
    order = np.argsort(ids)
    return tuple(ids[order].tolist()), tuple(names[order].tolist())


def _checked_boxes(
    in_images: Integers,
    of_categories: Integers,
    boxes_xyxy_px: npt.NDArray[np.float32],
    crowd: npt.NDArray[np.bool_],
    *,
    image_ids: Integers,
    sizes: Integers,
    category_ids: tuple[int, ...],
) -> tuple[Integers, Integers, npt.NDArray[np.float32]]:
    """Of each box that is kept: its image's row (N,) ascending, class index (N,) and clipped corners (N, 4).

    boxes_xyxy_px is overwritten.
    """
    rows = _positions(in_images, image_ids, "image")
    labels = _positions(of_categories, np.array(category_ids), "category")
    limits = sizes[rows].astype(np.float32)
    for corners in (boxes_xyxy_px[:, :2], boxes_xyxy_px[:, 2:]):
        np.clip(corners, 0, limits, out=corners)
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
