"""What a dump will do, decided from parameters and annotations before the teacher runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from common.augment import TRAIN_POLICY, AugmentPolicy, apply_boxes, apply_image, flip_policy
from common.cache.plan import Plan, make_plan
from common.cache.schema import CodecInfo, DataInfo, Layout, Manifest, ViewInfo
from common.coco import Annotations
from common.errors import UserError
from common.images import load_image, pixel_fingerprint
from common.records import Augmentation, ImageEntry, Targets
from common.runtime import software_versions
from teacher_dump.config import DumpConfig
from teacher_dump.teachers import Teacher


@dataclass(frozen=True)
class Job:
    """Everything that decides what is written."""

    annotations: Annotations
    entries: dict[int, ImageEntry]
    teacher: Teacher
    manifest: Manifest
    plan: Plan


@dataclass(frozen=True)
class Sample:
    """One row of the plan with its replayed pixels, uint8 (3, h, w), or with the reason why it has none."""

    row: int
    image_id: int
    view: int
    targets: Targets
    image: Tensor | None
    broken: str = ""


def prepare(config: DumpConfig, annotations: Annotations, teacher: Teacher) -> Job:
    """The manifest and the plan."""
    if not 0 < config.store.keep_tokens <= 1:
        raise UserError(f"expected --keep-tokens above 0 and at most 1, found {config.store.keep_tokens}")
    for name, value in (("--views", config.data.views), ("--batch-size", config.teacher.batch_size)):
        if value < 1:
            raise UserError(f"expected {name} of 1 or more, found {value}")
    policy = _policy(config.data.sizes)
    versions = software_versions()
    draft = Manifest(
        teacher=teacher.info,
        data=DataInfo(
            split=config.data.split,
            annotations_sha256=annotations.sha256,
            images=len(annotations.entries),
            category_ids=annotations.category_ids,
            class_names=annotations.class_names,
        ),
        views=ViewInfo(config.data.seed, config.data.views, policy, pixel_fingerprint()),
        codec=CodecInfo(config.store.tokens, config.store.keep_tokens),
        layout=Layout(samples=0, shard_samples=1, shard_tokens=1, page_tokens=1),  # the plan decides it
        batch_size=config.teacher.batch_size,
        software={name: versions[name] for name in ("detrcache", "torch", "torchvision")},
    )
    fields = draft.fields()
    plan = make_plan(
        annotations.entries,
        seed=config.data.seed,
        views=config.data.views,
        policy=policy,
        strides=teacher.info.strides,
        keep_tokens=config.store.keep_tokens,
        token_bytes=sum(field.row_bytes for field in fields if field.per == "token"),
        sample_bytes=sum(field.row_bytes for field in fields if field.per == "sample"),
        group=config.teacher.batch_size,
    )
    entries = {entry.image_id: entry for entry in annotations.entries}
    return Job(annotations, entries, teacher, replace(draft, layout=plan.layout), plan)


def load_sample(job: Job, row: int, skip_broken: bool) -> Sample:
    """Decode and replay one row of the plan. A broken image is a UserError, or a sample without pixels."""
    table = job.plan.table
    entry, augmentation = job.entries[int(table.image_id[row])], augmentation_of(table.augmentation[row])
    targets = apply_boxes(entry, augmentation)
    sample = Sample(row, entry.image_id, int(table.view[row]), targets, image=None)
    try:
        image = load_image(job.annotations.image_path(entry), expected_size=(entry.width, entry.height))
    except UserError as error:
        if not skip_broken:
            raise UserError(f"{error} (--skip-broken goes on without such images)") from None
        return replace(sample, broken=str(error))
    return replace(sample, image=apply_image(image, augmentation))


def _policy(sizes: tuple[int, ...] | None) -> AugmentPolicy:
    if sizes is None:
        return TRAIN_POLICY
    if len(sizes) == 1:
        return flip_policy(sizes[0])
    return AugmentPolicy(
        name="flip_resize", flip_probability=0.5, short_sides=tuple(sizes), max_long_side=round(max(sizes) * 5 / 3)
    )


def augmentation_of(integers: np.ndarray) -> Augmentation:
    flip, *rest = (int(value) for value in integers)
    return Augmentation(bool(flip), *rest)
