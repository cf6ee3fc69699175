"""Whether boxes are what COCO's format says, [left, top, width, height] in pixels of the listed sizes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from common.errors import UserError

BULK = 10  # boxes, fewer say nothing of a convention
TOLERANCE_PX = 1.0  # that annotation tools round by
SOME, MOST, ALL = 0.1, 0.5, 0.99  # shares of all boxes

Floats = npt.NDArray[np.float64]


def check_convention(boxes_xywh_px: Floats, sizes: npt.NDArray[np.int64]) -> str:
    """UserError, with what they look like, where boxes in bulk cannot be meant as pixels of their images; a warning, or
    nothing, where they can.

    boxes_xywh_px: (A, 4). sizes: (A, 2) width and height of each box's image.

    Tools draw a few boxes over the border, so one box says nothing. Of boxes that are corners or centres in truth, many
    leave their image when they are read as left, top, width, height, and all lie inside when they are read rightly; of
    boxes that are meant as they stand, few are inside when they are read so.
    """
    if len(boxes_xywh_px) < BULK:
        return ""
    first, second = boxes_xywh_px[:, :2], boxes_xywh_px[:, 2:]
    small = second.max(axis=1) <= 1
    if small.mean() > MOST:
        raise UserError(
            f"expected every 'bbox' as [left, top, width, height] in pixels, found {small.mean():.0%} of them at most"
            f" one pixel wide and high, such as {_shown(boxes_xywh_px, small)}: these look like fractions of the"
            " image's sides; multiply them by its width and height"
        )
    outside = ~_inside(first, first + second, sizes)
    share = float(outside.mean())
    other = ""
    if share > SOME and ((second > first).all(axis=1) & _inside(first, second, sizes)).mean() > ALL:
        other = "these look like corners, [left, top, right, bottom]; write right - left and bottom - top"
    elif share > SOME and _inside(first - second / 2, first + second / 2, sizes).mean() > ALL:
        other = "these look like [centre x, centre y, width, height]; write the left and the top edge"
    elif share > MOST:
        other = "are they of images of another size than the listed one?"
    leaving = f"{share:.0%} of them leaving their images, such as {_shown(boxes_xywh_px, outside)}"
    if other:
        raise UserError(f"expected every 'bbox' as [left, top, width, height] in pixels, found {leaving}: {other}")
    if share > SOME:
        return f"every 'bbox' is read as [left, top, width, height] in pixels: {leaving}, are cut at the border"
    return ""


def _inside(low: Floats, high: Floats, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    return np.asarray(((low >= -TOLERANCE_PX) & (high <= sizes + TOLERANCE_PX)).all(axis=1))


def _shown(boxes: Floats, which: npt.NDArray[np.bool_]) -> list[float]:
    example: list[float] = boxes[int(which.argmax())].tolist()
    return example
