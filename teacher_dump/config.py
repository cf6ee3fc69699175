"""What a user of phase one can choose. The fields' docstrings are the help that `--help` prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from common.cache.schema import TokenCodec


@dataclass(frozen=True)
class DataOptions:
    """The images and how they are augmented."""

    data: Path = Path("data/coco")
    """Folder with annotations/instances_SPLIT.json and the splits' images, in COCO's layout."""
    split: str = "train2017"
    """Split to dump."""
    views: int = 1
    """Augmentations of every image. Epoch e of a student sees view e modulo this."""
    seed: int = 0
    """Seed of the augmentations and of the token sampling."""
    sizes: tuple[int, ...] | None = None
    """Short sides in pixels to draw from, instead of Deformable DETR's 480, 512, ... 800; no crops then."""
    skip_broken: bool = False
    """Leave out images that cannot be decoded and list them at the end, instead of stopping at the first."""
    workers: int = 4
    """Threads that decode and replay images."""


@dataclass(frozen=True)
class TeacherOptions:
    """The model that runs once."""

    teacher: str = "teacher.pth"
    """Checkpoint file (official Deformable DETR, MMDetection, DETRDistill, transformers, or a student of this project),
    or random:r101 (r50, r18, ...) for a trial with untrained weights."""
    batch_size: int = 4
    """Samples that the teacher sees at once."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class StoreOptions:
    """What is stored and where."""

    out: Path = Path("store.zarr")
    """The store to write. An unfinished one of the same configuration is completed."""
    tokens: TokenCodec = "fp16"
    """How token features are stored: fp32 is lossless, int8 takes half of fp16's bytes."""
    keep_tokens: float = 1.0
    """Fraction of each sample's tokens to keep, drawn by their weight without bias; 1 keeps all."""


@dataclass(frozen=True)
class DumpConfig:
    """Run the teacher once over every augmented sample and write what students need to a Zarr store."""

    data: Annotated[DataOptions, tyro.conf.arg(name="")] = field(default_factory=DataOptions)
    teacher: Annotated[TeacherOptions, tyro.conf.arg(name="")] = field(default_factory=TeacherOptions)
    store: Annotated[StoreOptions, tyro.conf.arg(name="")] = field(default_factory=StoreOptions)
