"""Detectors by their short names, for `--student r50` and `--teacher random:r101`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from common.detr.config import DetectorConfig

PRESETS: dict[str, Callable[..., DetectorConfig]] = {
    "r18": partial(DetectorConfig, "resnet18"),
    "r34": partial(DetectorConfig, "resnet34"),
    "r50": partial(DetectorConfig, "resnet50"),
    "r101": partial(DetectorConfig, "resnet101"),
    "mobilenet_v2": partial(DetectorConfig, "mobilenet_v2"),
    # For drawn scenes of 128 x 128 pixels: 336 tokens, trained from scratch in minutes on a CPU.
    "tiny": partial(
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
    ),
}
"""name -> function of num_classes, and of any field to override by keyword, that gives the configuration."""
