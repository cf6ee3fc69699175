"""The images of a split and their annotations, as arrays: Python objects are made of the images at hand only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import numpy.typing as npt

from common.records import ImageEntry

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """All annotations of a split as they stand in the json, crowd regions and boxes over the border included: what the
    evaluation compares with. Ascending by image id, and within an image in the order of the json.

    labels: (A,) class indices. boxes_xywh_px: (A, 4). areas_px: (A,). crowd: (A,) bool.
    """

    labels: Integers
    boxes_xywh_px: Floats
    areas_px: Floats
    crowd: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class ImageEntries(Sequence[ImageEntry]):
    """Images, ascending by id. One of them is an `ImageEntry`, made when it is asked for; a slice, an array of indices
    or a mask gives some of them, which share the names and the annotations.

    image_ids: (N,). sizes: (N, 2) width and height. names: bytes (uint8) of the file names in UTF-8; name_bounds:
    (N, 2) where each begins and ends in them. truth: all annotations; box_bounds: (N, 2) where those of each image
    begin and end among them.
    """

    image_ids: Integers
    sizes: Integers
    names: npt.NDArray[np.uint8]
    name_bounds: Integers
    box_bounds: Integers
    truth: GroundTruth

    def __len__(self) -> int:
        return len(self.image_ids)

    @overload
    def __getitem__(self, index: int) -> ImageEntry: ...
    @overload
    def __getitem__(self, index: slice | npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> ImageEntries: ...
    def __getitem__(
        self, index: int | slice | npt.NDArray[np.intp] | npt.NDArray[np.bool_]
    ) -> ImageEntry | ImageEntries:
        if isinstance(index, slice | np.ndarray):
            columns = ("image_ids", "sizes", "name_bounds", "box_bounds")
            return replace(self, **{name: getattr(self, name)[index] for name in columns})
        width, height = self.sizes[index].tolist()
        return ImageEntry(
            int(self.image_ids[index]), self.file_name(index), width, height, *self._boxes_to_learn(index)
        )

    def of_image(self, image_id: int) -> ImageEntry:
        """The image with this id; KeyError if there is none."""
        row = int(self.rows_of(np.array([image_id]))[0])
        if row < 0:
            raise KeyError(image_id)
        return self[row]

    def rows_of(self, image_ids: Integers) -> Integers:
        """The index of each of these images, -1 where it is not here."""
        if not len(self):
            return np.full(len(image_ids), -1)
        rows = np.searchsorted(self.image_ids, image_ids).clip(max=len(self) - 1)
        return np.where(self.image_ids[rows] == image_ids, rows, -1)

    def file_name(self, index: int) -> str:
        start, end = self.name_bounds[index].tolist()
        return self.names[start:end].tobytes().decode()

    def file_names(self) -> Iterator[bytes]:
        """All file names, in UTF-8."""
        names = self.names.tobytes()
        for first in range(0, len(self), 4096):
            for start, end in self.name_bounds[first : first + 4096].tolist():
                yield names[start:end]

    def _boxes_to_learn(self, index: int) -> tuple[npt.NDArray[np.float32], Integers]:
        """Corners (G, 4) and labels (G,) of the image's boxes: crowd regions are left out, boxes are clipped to the
        image, and those left empty are dropped."""
        start, end = self.box_bounds[index].tolist()
        left_top, size = np.hsplit(self.truth.boxes_xywh_px[start:end], 2)
        # Rounded before they are clipped, which gives the same: an image's sides are exact in float32.
        boxes_xyxy_px = np.concatenate((left_top, left_top + size), axis=1).astype(np.float32)
        np.clip(boxes_xyxy_px, 0, np.tile(self.sizes[index].astype(np.float32), 2), out=boxes_xyxy_px)
        kept = ~self.truth.crowd[start:end] & (boxes_xyxy_px[:, 2:] > boxes_xyxy_px[:, :2]).all(axis=1)
        return boxes_xyxy_px[kept], self.truth.labels[start:end][kept]
