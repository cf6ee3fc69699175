"""What a dump will write and cost, before anything is written."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from common.cache.plan import field_bytes, store_bytes
from common.cache.storage import locate
from common.coco import Annotations, load_annotations
from common.devices import choose_device
from common.errors import UserError
from common.subset import take_subset
from teacher_dump.config import RANDOM, DumpConfig, PlanConfig
from teacher_dump.encode import Statistics, calibrate, calibrations, encode_records, run_teacher, statistics_of
from teacher_dump.job import Job, load_sample, prepare, rule_of_dump
from teacher_dump.several import one_by_one
from teacher_dump.tables import duration, facts, size, table
from teacher_dump.teachers import load_teacher


@dataclass(frozen=True)
class Costs:
    """Measured seconds per sample. images: decoding and replaying, in one thread; teacher: running it and deriving the
    targets from its answer, which a live teacher would cost too; encode: sampling and quantising."""

    images_s: float
    teacher_s: float
    encode_s: float

    def dump_s(self, workers: int) -> float:
        """Of a whole dump: images are made ready beside the teacher; so is writing, on any disk that keeps up."""
        return max(self.images_s / workers, self.teacher_s + self.encode_s)


def run_plan(config: PlanConfig) -> str:
    """The report, for people. Decodes no image and asks the teacher for its shapes only, unless told to measure."""
    if config.measure < 0 or config.student_epochs < 1:
        raise UserError("expected --measure of 0 or more and --student-epochs of 1 or more")
    data = config.data
    annotations = take_subset(load_annotations(data.data, data.split, data.image_folder), data.subset)
    dumps = one_by_one(DumpConfig(config.data, config.teacher, config.store))
    plans = [_plan_teacher(replace(config, teacher=one.teacher, store=one.store), annotations) for one in dumps]
    total_bytes, free = sum(needed for needed, _ in plans), locate(config.store.out).free_bytes()
    together = [] if len(plans) == 1 else ["", f"all teachers: {size(total_bytes)}; free: {_room(total_bytes, free)}"]
    return "\n".join([*(line for _, lines in plans for line in lines), *together])


def _plan_teacher(config: PlanConfig, annotations: Annotations) -> tuple[int, list[str]]:
    """The bytes of one teacher's store, and the lines about it."""
    (name,) = config.teacher.teachers
    shapes_only = torch.device("meta" if name.startswith(RANDOM) else "cpu")
    device = choose_device(config.teacher.device) if config.measure else shapes_only
    annotations = annotations.decoded_by(rule_of_dump(config.store.out, config.data.exif))
    teacher = load_teacher(name, annotations, device, config.teacher.teacher_size, amp=config.teacher.precision)
    job = prepare(DumpConfig(config.data, config.teacher, config.store), annotations, teacher)
    costs = measure(job, config.measure) if config.measure else None
    lines = ["", *_store_lines(job, config), "", *_cost_lines(job, config, costs, str(device))]
    return store_bytes(job.manifest, job.plan.table), lines


def measure(job: Job, batches: int) -> Costs:
    """Run that many of the dump's batches, evenly spaced over the plan, after one to warm up."""
    group, count = job.manifest.batch_size, len(job.plan.table)
    statistics = Statistics()
    times_s = []
    for start in (0, *np.linspace(0, max(0, count - group), batches, dtype=int).tolist()):
        marks_s = [time.perf_counter()]
        samples = [load_sample(job, row, skip_broken=True) for row in range(start, min(start + group, count))]
        marks_s.append(time.perf_counter())
        answers = run_teacher(job, samples)
        marks_s.append(time.perf_counter())
        if statistics.tokens is None:
            broken = [sample.broken for sample in samples if sample.image is None]
            statistics = statistics_of(calibrate(job.manifest, calibrations(job.manifest, samples, answers), broken))
        encode_records(job, samples, answers, statistics)
        marks_s.append(time.perf_counter())
        times_s.append(np.diff(marks_s) / len(samples))
    images_s, teacher_s, encode_s = np.mean(times_s[1:], axis=0).tolist()
    return Costs(images_s, teacher_s, encode_s)


def _store_lines(job: Job, config: PlanConfig) -> list[str]:
    manifest, samples = job.manifest, job.plan.table
    tokens = samples.level_shapes.prod(axis=2, dtype=np.int64).sum(axis=1)
    kept = int(samples.token_count.sum())
    total_bytes, free = store_bytes(manifest, samples), locate(config.store.out).free_bytes()
    images, views, count = len(job.annotations.entries), manifest.views.views, len(samples)
    rows = [("field", "dtype", "a sample", "in all", "share")]
    for field in manifest.fields():
        in_all = field_bytes(manifest, samples, field)
        rows.append((field.name, field.dtype, size(in_all / count), size(in_all), f"{in_all / total_bytes:.1%}"))
    rows.append(("all", "", size(total_bytes / count), size(total_bytes), "100.0%"))
    shard_bytes = total_bytes / manifest.layout.shards
    teacher = manifest.teacher
    return [
        *facts(
            [
                ("store", f"{config.store.out}"),
                ("data", f"{config.data.data}, {config.data.split}: {images} images, {manifest.num_classes} classes"),
                (
                    "teacher",
                    f"{teacher.name}: {teacher.layers} layers, {teacher.queries} queries, {teacher.channels} channels,"
                    f" strides {', '.join(map(str, teacher.strides))}" + ("" if teacher.trained else "; UNTRAINED"),
                ),
                ("samples", f"{images} images x {views} view{'s' * (views > 1)} = {count}"),
                (
                    "tokens",
                    f"{tokens.sum()}, {tokens.mean():.0f} a sample ({tokens.min()} to {tokens.max()});"
                    f" kept: {kept} ({kept / tokens.sum():.1%})",
                ),
            ]
        ),
        "",
        *table(rows),
        "",
        *facts(
            [
                ("bytes", f"exactly {total_bytes} in shard files, and under {size(100 * count + 25_000)} of metadata"),
                (
                    "shards",
                    f"{manifest.layout.shards} of {manifest.layout.shard_samples} samples, {size(shard_bytes)} each:"
                    " what one rank writes at once and an interruption can lose",
                ),
                ("free", _room(total_bytes, free)),
            ]
        ),
    ]


def _room(needed_bytes: int, free_bytes: int | None) -> str:
    if free_bytes is None:
        return "a bucket does not say"
    enough = "enough" if needed_bytes <= free_bytes else f"NOT ENOUGH, {size(needed_bytes - free_bytes)} are missing"
    return f"{size(free_bytes)}: {enough}"


def _cost_lines(job: Job, config: PlanConfig, costs: Costs | None, device: str) -> list[str]:
    samples, images = len(job.plan.table), len(job.annotations.entries)
    epochs, record_bytes = config.student_epochs, store_bytes(job.manifest, job.plan.table) / samples
    reading = f"each epoch of a student reads {size(record_bytes * images)}"
    if costs is None:
        runs = job.manifest.views.views / epochs
        return facts(
            [
                ("time", "not measured; --measure 8 runs eight batches to find out"),
                ("pays after", f"{runs:.3g} student runs of {epochs} epochs: {_formula(epochs)}"),
                ("reading", reading),
            ]
        )
    dump_s = costs.dump_s(config.data.workers)
    runs = dump_s * samples / (costs.teacher_s * images * epochs)
    return facts(
        [
            (
                "time",
                f"{duration(dump_s * samples)} on one {device} device, divided by the number of devices: measured"
                f" {dump_s:.3g} s a sample",
            ),
            (
                "of which",
                f"teacher {costs.teacher_s:.3g} s, encoding {costs.encode_s:.3g} s; images {costs.images_s:.3g} s,"
                f" meanwhile in {config.data.workers} threads",
            ),
            ("pays after", f"{runs:.3g} student runs of {epochs} epochs: {_formula(epochs)}"),
            (
                "saves",
                f"{duration(costs.teacher_s * images * epochs)} of teacher in each student run that follows",
            ),
            ("reading", reading),
        ]
    )


def _formula(epochs: int) -> str:
    return f"(dump) / ({epochs} epochs x images x teacher), where reading keeps up with training"
