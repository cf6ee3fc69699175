"""The annotation index of a COCO-format data set.

    data/
      annotations/instances_<split>.json
      <split>/*.jpg

Classes are 0..K-1 in ascending order of category id, whatever the ids are (COCO's own go from 1 to 90 with gaps).
Only the json is read, once, no image is opened.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from common.annotation_cache import load_instances
from common.categories import Categories, match_names
from common.entries import GroundTruth, ImageEntries
from common.errors import UserError
from common.inputs import annotation_file
from common.pixel_rule import PixelRule
from common.records import ImageEntry
from common.runtime import log


@dataclass(frozen=True)
class Annotations:
    """All images of one split and what is in them.

    entries: every image of the json, sorted by image id, those without annotations included; the boxes of an image are
    in the order of the json. category_ids, class_names: of each class index, ascending by id unless the split was put
    in the order of another (`in_order_of`).
    sha256: of the json file's bytes, in hexadecimal: the identity of the annotations. rule: how its images are decoded.
    """

    entries: ImageEntries
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    annotation_file: Path
    image_folder: Path
    sha256: str
    rule: PixelRule = field(default_factory=PixelRule)

    @property
    def categories(self) -> Categories:
        return Categories(self.category_ids, self.class_names)

    @property
    def truth(self) -> GroundTruth:
        """Of all images of the json, whichever of them are in `entries`."""
        return self.entries.truth

    @property
    def num_classes(self) -> int:
        return len(self.category_ids)

    def image_path(self, entry: ImageEntry) -> Path:
        return self.image_folder / entry.file_name

    def decoded_by(self, rule: PixelRule) -> Annotations:
        """The same with another rule for their images."""
        return replace(self, rule=rule)


def load_annotations(data: Path, split: str, image_folder: Path | None = None) -> Annotations:
    """Read data/annotations/instances_<split>.json, of images in `image_folder`, by default data/<split>.

    Of the boxes to learn from, crowd regions are left out; they are clipped to their image, and those left empty are
    dropped. The ground truth has all of them, as they stand in the json.

    Raises UserError where the layout, the json, or a reference within it is broken.
    """
    file, image_folder = annotation_file(data, split, image_folder), image_folder or data / split
    try:
        found = load_instances(file, image_folder)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None

    if found.warning:
        log.warning(found.warning)
    return Annotations(found.entries, found.category_ids, found.class_names, file, image_folder, found.sha256)


def in_order_of(split: Annotations, other: Annotations) -> Annotations:
    """A split with its classes in the order of another's, by name; its own ids stay theirs. UserError where they are
    not the same classes."""
    ours, theirs = split.categories, other.categories
    if ours == theirs or (ours.ids == theirs.ids and not (ours.named and theirs.named)):
        return split
    found = match_names(ours.names, theirs.names)
    order = [index for index in found if index is not None]
    if not (ours.named and theirs.named and len(order) == len(ours.names) == len(theirs.names)):
        lost = [name for name, index in zip(theirs.names, found, strict=True) if index is None]
        more = [name for index, name in enumerate(ours.names) if index not in found]
        differing = f"without {', '.join(lost[:3]) or 'none'}, and with {', '.join(more[:3]) or 'none'} more"
        raise UserError(
            f"{split.annotation_file}: expected the categories of {other.annotation_file}, {theirs}, found {ours},"
            f" {differing}: list the same categories in both, even those without boxes"
        )
    moved = next((k for k, index in enumerate(order) if ours.ids[index] != theirs.ids[k]), None)
    if moved is not None:
        log.info(
            f"{split.annotation_file}: classes go by name, their ids are not those of {other.annotation_file}:"
            f" {theirs.names[moved]!r} is {ours.ids[order[moved]]} here, {theirs.ids[moved]} there"
        )
    place = np.argsort(order)
    return replace(
        split,
        category_ids=tuple(ours.ids[index] for index in order),
        class_names=tuple(ours.names[index] for index in order),
        entries=replace(split.entries, truth=replace(split.truth, labels=place[split.truth.labels])),
    )


def missing_images(annotations: Annotations) -> list[str]:
    """File names of the index that are not in the image folder, found by listing it once."""
    folder, entries = annotations.image_folder, annotations.entries
    # Hashes of 64 bits in place of a million names in memory. Two that are equal by chance would hide a missing file
    # here, and it would be named when it is read.
    with os.scandir(os.fsencode(folder)) as listing:
        present = np.fromiter((hash(item.name) for item in listing), np.int64)
    wanted = np.fromiter(map(hash, entries.file_names()), np.int64, len(entries))
    names = map(entries.file_name, np.flatnonzero(~np.isin(wanted, present)).tolist())
    return [name for name in names if not ("/" in name and (folder / name).is_file())]


def check_images(annotations: Annotations) -> None:
    """Raise UserError, with the count and the first name, where image files are missing."""
    missing = missing_images(annotations)
    if missing:
        raise UserError(
            f"expected {len(annotations.entries)} images in {annotations.image_folder}, but {len(missing)} are "
            f"missing, the first is {missing[0]}: add them, or remove them from {annotations.annotation_file}"
        )
