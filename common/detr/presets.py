"""Detectors by their short names, for `--student r50` and `--teacher random:r101`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from common.detr.config import DetectorConfig
from common.errors import UserError

# For drawn scenes of 128 x 128 pixels: 336 tokens, trained from scratch in minutes on a CPU.
_TINY = partial(
    DetectorConfig,
    "tiny",
    width=64,
    encoder_layers=1,
    decoder_layers=3,
    heads=8,
    queries=40,
    levels=3,
    feedforward=256,
    dropout=0.0,
    pretrained_backbone=False,
)

PRESETS: dict[str, Callable[..., DetectorConfig]] = {
    "r50": partial(DetectorConfig, "resnet50"),
    "r18": partial(DetectorConfig, "resnet18"),
    "r34": partial(DetectorConfig, "resnet34"),
    "r101": partial(DetectorConfig, "resnet101"),
    "mobilenet_v2": partial(DetectorConfig, "mobilenet_v2"),
    "mobilenet_v2_1280": partial(DetectorConfig, "mobilenet_v2_1280"),
    # The tiny teacher's backbone has twice the blocks and a third more channels than the tiny student's.
    "tiny": partial(_TINY, tiny_channels=(9, 12, 24, 48, 96), tiny_blocks=1),
    "tiny_teacher": partial(_TINY, tiny_channels=(12, 16, 32, 64, 128), tiny_blocks=2),
}
"""name -> function of num_classes, and of any field to override by keyword, that gives the configuration."""


def preset_named(name: str, flag: str) -> Callable[..., DetectorConfig]:
    """The preset `name`; "timm:NAME" is the recipe's detector on that backbone of timm's.

    flag: what stands before the name on the command line. UserError with the nearest name.
    """
    if name.startswith("timm:"):
        return partial(DetectorConfig, name)
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f": is it {near[0]}?" if near else ""
        raise UserError(f"expected {flag}{'|'.join(PRESETS)}|timm:NAME, found {flag}{name}{hint}")
    return PRESETS[name]
