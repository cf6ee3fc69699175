"""The students by name: the detectors of the recipe, and two small ones for drawn scenes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from common.detr.config import DetectorConfig
from common.detr.presets import PRESETS

StudentName = Literal["r50", "r18", "r34", "r101", "mobilenet_v2", "tiny", "tiny_teacher"]

_TINY = PRESETS["tiny"]

# name -> function of num_classes, and of any field to override by keyword, that gives the configuration
STUDENTS: dict[StudentName, Callable[..., DetectorConfig]] = {
    "r50": PRESETS["r50"],
    "r18": PRESETS["r18"],
    "r34": PRESETS["r34"],
    "r101": PRESETS["r101"],
    "mobilenet_v2": PRESETS["mobilenet_v2"],
    # The tiny teacher's backbone has twice the blocks and a third more channels than the tiny student's.
    "tiny": partial(_TINY, tiny_channels=(9, 12, 24, 48, 96), tiny_blocks=1),
    "tiny_teacher": partial(_TINY, tiny_channels=(12, 16, 32, 64, 128), tiny_blocks=2),
}
