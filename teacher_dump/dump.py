"""Phase one: run the teacher once over every sample of the plan and write the store.

A dump is a loop over shards. Each is written whole or not at all and depends on nothing but the manifest: an
interrupted dump, run again, skips the shards that are there and ends with the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from common.ahead import map_ahead
from common.cache.members import create_group
from common.cache.plan import store_bytes
from common.cache.reader import CorruptRecord
from common.cache.storage import Location, OutOfReach
from common.coco import Annotations, check_images, load_annotations
from common.devices import choose_device
from common.runtime import BAR_INTERVAL_S, Ranks, log, read_ranks
from common.subset import take_subset
from teacher_dump.config import DumpConfig
from teacher_dump.encode import (
    Calibration,
    calibrate,
    calibration_rows,
    calibrations,
    encode_records,
    read_statistics,
    run_teacher,
)
from teacher_dump.job import Job, batches, load_sample, prepare, rule_of_dump
from teacher_dump.score import score_store
from teacher_dump.several import one_by_one
from teacher_dump.store import Batches, missing_shards, shard_rows, writable_store, write_errors, write_shards
from teacher_dump.teachers import load_teacher
from teacher_dump.weight_map import inside_ratio


@dataclass(frozen=True)
class Summary:
    """What this process did: samples and bytes written, seconds, and the images left out as broken."""

    samples: int
    written_bytes: int
    duration_s: float
    broken: tuple[str, ...]


def run_dump(config: DumpConfig) -> Summary:
    """Write, or complete, the store that `config` asks for; of several teachers one after the other."""
    ranks = read_ranks()
    device = choose_device(config.teacher.device, ranks)
    data = config.data
    annotations = take_subset(load_annotations(data.data, data.split, data.image_folder), data.subset)
    check_images(annotations)
    dumps = one_by_one(config)
    if dumps != [config] and ranks.is_first:
        with write_errors(config.store.out):
            create_group(config.store.out)
    done = [_dump_teacher(one, annotations, device, ranks) for one in dumps]
    return Summary(
        sum(summary.samples for summary in done),
        sum(summary.written_bytes for summary in done),
        sum(summary.duration_s for summary in done),
        tuple(dict.fromkeys(reason for summary in done for reason in summary.broken)),
    )


def _dump_teacher(config: DumpConfig, annotations: Annotations, device: torch.device, ranks: Ranks) -> Summary:
    """The store of one teacher, which leaves memory when this returns."""
    (name,) = config.teacher.teachers
    annotations = annotations.decoded_by(rule_of_dump(config.store.out, config.data.exif))
    teacher = load_teacher(name, annotations, device, config.teacher.teacher_size, amp=config.teacher.precision)
    job = prepare(config, annotations, teacher)
    log.info(
        f"{config.store.out}: {len(annotations.entries)} images x {config.data.views} views ="
        f" {len(job.plan.table)} samples, {store_bytes(job.manifest, job.plan.table) / 1e9:.3g} GB in"
        f" {job.manifest.layout.shards} shards; teacher {teacher.info.name} on {device}"
    )
    summary = write_missing(job, config.store.out, config.data.workers, config.data.skip_broken, ranks)
    for line in annotations.rule.report():
        log.warning(line)
    if ranks.is_first:
        _log_score(config.store.out, annotations)
    return summary


def _log_score(out: Location, annotations: Annotations) -> None:
    """Say how good the teacher is and where it looks by what was written, where that can be read back."""
    try:
        if (score := score_store(out, annotations)) is not None:
            log.info(str(score))
        if (ratio := inside_ratio(out, annotations)) is not None:
            log.info(str(ratio))
    except (CorruptRecord, OutOfReach) as error:
        log.warning(f"{out} is written, but the teacher could not be scored by it: {error}")


def write_missing(job: Job, out: Location, workers: int, skip_broken: bool, ranks: Ranks) -> Summary:
    """This rank's share of the shards that are not there yet: load, run the teacher, write behind it."""
    manifest = job.manifest
    with writable_store(out, manifest, job.plan, lambda: store_constants(job), ranks):
        begin_s = time.monotonic()
        shards = missing_shards(out, manifest, ranks)
        rows = [row for shard in shards for row in shard_rows(shard, manifest.layout)]
        record_bytes = store_bytes(manifest, job.plan.table) / len(job.plan.table)
        statistics = read_statistics(out)
        broken: dict[str, None] = {}
        with (
            ThreadPoolExecutor(workers, "images") as pool,
            tqdm(
                total=len(rows), unit=" samples", disable=not ranks.is_first, desc="teacher", mininterval=BAR_INTERVAL_S
            ) as bar,
        ):
            samples = map_ahead(
                pool, lambda row: load_sample(job, row, skip_broken), rows, ahead=2 * manifest.batch_size
            )

            def batches_of(shard: int) -> Batches:
                for batch in batches(islice(samples, len(shard_rows(shard, manifest.layout))), manifest.batch_size):
                    blank = [sample for sample in batch if sample.image is None]
                    broken.update(dict.fromkeys(sample.broken for sample in blank))
                    answers = run_teacher(job, batch)
                    yield partial(encode_records, job, batch, answers, statistics), [sample.row for sample in blank]
                    bar.set_postfix_str(f"{(bar.n + len(batch)) * record_bytes / 1e9:.3g} GB", refresh=False)
                    bar.update(len(batch))

            write_shards(out, manifest, job.plan, shards, batches_of)
    return Summary(len(rows), int(len(rows) * record_bytes), time.monotonic() - begin_s, tuple(broken))


def store_constants(job: Job) -> dict[str, npt.NDArray[np.float32]]:
    """What the store has once: the teacher's constants, and channel statistics or codebooks from some of its samples.

    Computed when a store is created and read from it ever after, so every rank and every rerun has the same.
    """
    constants = dict(job.teacher.constants)
    if job.manifest.codec.calibrated:
        samples: list[Calibration] = []
        broken: list[str] = []
        chosen = calibration_rows(len(job.plan.table), job.manifest.batch_size)
        for rows in tqdm(chosen, desc="calibration", unit=" batches", mininterval=BAR_INTERVAL_S):
            loaded = [load_sample(job, row, skip_broken=True) for row in rows]
            samples += calibrations(job.manifest, loaded, run_teacher(job, loaded))
            broken += [sample.broken for sample in loaded if sample.image is None]
        constants |= calibrate(job.manifest, samples, broken)
    return constants
