"""The students by name: the detectors of the recipe, two small ones for drawn scenes, and any backbone of timm's."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from common.detr.config import DetectorConfig
from common.detr.presets import PRESETS
from common.errors import UserError

_TINY = PRESETS["tiny"]

# name -> function of num_classes, and of any field to override by keyword, that gives the configuration
STUDENTS: dict[str, Callable[..., DetectorConfig]] = {
    "r50": PRESETS["r50"],
    "r18": PRESETS["r18"],
    "r34": PRESETS["r34"],
    "r101": PRESETS["r101"],
    "mobilenet_v2": PRESETS["mobilenet_v2"],
    # The tiny teacher's backbone has twice the blocks and a third more channels than the tiny student's.
    "tiny": partial(_TINY, tiny_channels=(9, 12, 24, 48, 96), tiny_blocks=1),
    "tiny_teacher": partial(_TINY, tiny_channels=(12, 16, 32, 64, 128), tiny_blocks=2),
}


def student_named(name: str) -> Callable[..., DetectorConfig]:
    """The student `name`; "timm:NAME" is the recipe's detector on that backbone. UserError with the nearest name."""
    if name.startswith("timm:"):
        return partial(DetectorConfig, name)
    if name not in STUDENTS:
        near = difflib.get_close_matches(name, STUDENTS, n=1)
        hint = f": is it {near[0]}?" if near else ""
        raise UserError(f"expected --student {', '.join(STUDENTS)} or timm:NAME, found {name!r}{hint}")
    return STUDENTS[name]
