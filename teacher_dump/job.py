"""What a dump will do, decided from parameters and annotations before the teacher runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from common.augment import AugmentPolicy, evaluation_policy, policy_of_sizes
from common.cache.plan import Plan, make_plan
from common.cache.reader import read_manifest
from common.cache.schema import DataInfo, Layout, Manifest, ViewInfo, differences
from common.cache.storage import Location, locate
from common.cache.validate import check_crops, damage_explained
from common.cache.writer import read_table
from common.coco import Annotations, check_images, load_annotations
from common.devices import choose_device
from common.errors import UserError
from common.images import BrokenImage, load_entry, pixel_fingerprint
from common.pixel_rule import Exif, PixelRule, rule_of_store
from common.records import Augmentation, Targets
from common.replay import apply_boxes, apply_image
from common.runtime import software_versions
from common.subset import take_subset
from common.teacher import Teacher
from teacher_dump.config import DataOptions, DumpConfig, SourceOptions, split_name
from teacher_dump.teachers import load_teacher

Item = TypeVar("Item")


@dataclass(frozen=True)
class Job:
    """Everything that decides what is written."""

    annotations: Annotations
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
    """The manifest and the plan of a new store."""
    codec = config.store.codec
    if not 0 < codec.keep_tokens <= 1:
        raise UserError(f"expected --keep-tokens above 0 and at most 1, found {codec.keep_tokens}")
    if codec.neck and codec.keep_tokens < 1:
        raise UserError(f"expected all tokens with the neck's features, found --keep-tokens {codec.keep_tokens:g}")
    if codec.neck and not teacher.has_neck:
        raise UserError(
            f"expected a teacher that gives its neck's features, found {teacher.info.name}, of which only the encoder's"
            " output is known: leave --neck and --preset full out"
        )
    draft = Manifest(
        teacher=teacher.info,
        data=_data_info(annotations, config.data.split),
        views=ViewInfo(
            config.data.seed, config.data.views, _policy(config.data), pixel_fingerprint(), annotations.rule.exif
        ),
        codec=codec,
        layout=Layout(samples=0, shard_samples=1, shard_tokens=1, page_tokens=1),  # the plan decides it
        batch_size=config.teacher.batch_size,
        software=_software(),
    )
    plan = make_plan(
        annotations.entries.image_ids,
        annotations.entries.sizes,
        seed=draft.views.seed,
        views=draft.views.views,
        policy=draft.views.policy,
        strides=teacher.info.strides,
        input_size=teacher.info.input_size,
        keep_tokens=draft.codec.keep_tokens,
        token_bytes=draft.row_bytes("token"),
        sample_bytes=draft.row_bytes("sample"),
        group=draft.batch_size,
    )
    return Job(annotations, teacher, replace(draft, layout=plan.layout), plan)


def rule_of_dump(out: Location, wanted: Exif | None) -> PixelRule:
    """The rule of the store at `out` where one is, so that it can be completed; of a new one what is wanted."""
    if not locate(out).exists("zarr.json"):
        return PixelRule(wanted or "auto")
    return rule_of_store(out, read_manifest(out).views.exif, wanted)


def job_of_store(store: Location, source: SourceOptions, *, same_software: bool) -> Job:
    """The job that wrote `store`, for doing parts of it again.

    UserError where the teacher or the annotations are not the ones that it was written with, or, with
    `same_software`, where versions differ of what decides the bytes.
    """
    found = read_manifest(store)
    annotations = load_annotations(source.data, found.data.split, source.image_folder)
    if found.data.images < len(annotations.entries):
        annotations = take_subset(annotations, found.data.images)
    annotations = annotations.decoded_by(rule_of_store(store, found.views.exif, None))
    check_images(annotations)
    device = choose_device(source.device)
    name, of_store = split_name(source.teacher)[1], found.teacher
    teacher = load_teacher(name, annotations, device, of_store.input_size, amp=of_store.amp)
    expected = replace(
        found,
        teacher=teacher.info,
        data=_data_info(annotations, found.data.split),
        views=replace(found.views, pixel_fingerprint=pixel_fingerprint()),
        software=_software() if same_software else found.software,
    )
    different = differences(expected, found)
    if different:
        raise UserError(
            f"expected the teacher, data and software that {store} was written with, found (here against there):"
            f" {'; '.join(different)}"
        )
    with damage_explained(locate(store)):
        table = read_table(store, found)
        check_crops(table, annotations.entries)
    return Job(annotations, teacher, found, Plan(table, found.layout))


def _policy(data: DataOptions) -> AugmentPolicy:
    training = policy_of_sizes(data.sizes)
    return training if data.augment else evaluation_policy(training)


def batches(samples: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size`; the last one may be shorter."""
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch


def load_sample(job: Job, row: int, skip_broken: bool) -> Sample:
    """Decode and replay one row of the plan. A broken image is a UserError, or a sample without pixels; one that is
    missing, cannot be read, or has another size than its annotations is a UserError."""
    table = job.plan.table
    entry = job.annotations.entries.of_image(int(table.image_id[row]))
    augmentation = augmentation_of(table.augmentation[row])
    targets = apply_boxes(entry, augmentation)
    sample = Sample(row, entry.image_id, int(table.view[row]), targets, image=None)
    try:
        image = load_entry(job.annotations, entry)
    except BrokenImage as error:
        if not skip_broken:
            raise UserError(f"{error} (--skip-broken goes on without such images)") from None
        return replace(sample, broken=str(error))
    return replace(sample, image=apply_image(image, augmentation))


def augmentation_of(integers: npt.NDArray[np.int32]) -> Augmentation:
    """One row of a sample table's `augmentation`."""
    flip, *rest = (int(value) for value in integers)
    return Augmentation(bool(flip), *rest)


def _data_info(annotations: Annotations, split: str) -> DataInfo:
    return DataInfo(
        split=split,
        annotations_sha256=annotations.sha256,
        images=len(annotations.entries),
        category_ids=annotations.category_ids,
        class_names=annotations.class_names,
    )


def _software() -> dict[str, str]:
    versions = software_versions()
    return {name: versions[name] for name in ("detrcache", "torch", "torchvision")}
