"""Phase one: run the teacher once over every sample of the plan and write the store.

A dump is a loop over shards. Each is written whole or not at all and depends on nothing but the manifest: an
interrupted dump, run again, skips the shards that are there and ends with the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from common.ahead import WriteBehind, map_ahead
from common.cache.codec import ChannelStatistics, encode_tokens, measure_channels
from common.cache.plan import store_bytes
from common.cache.reader import read_constants, read_manifest
from common.cache.sampling import draw_tokens
from common.cache.schema import Layout, differences
from common.cache.writer import (
    Record,
    ShardWriter,
    blank_record,
    create_store,
    finished_shards,
    remove_partial,
    write_skipped,
)
from common.coco import check_images, load_annotations
from common.errors import UserError
from common.runtime import Ranks, choose_device, log, read_ranks
from teacher_dump.config import DumpConfig
from teacher_dump.job import Job, Sample, load_sample, prepare
from teacher_dump.targets import assignment_and_quality, token_weights
from teacher_dump.teachers import load_teacher

CALIBRATION_SAMPLES = 16  # of the plan's first samples, for the spread of the channels


@dataclass(frozen=True)
class Summary:
    """What this process did: samples and bytes written, seconds, and the images left out as broken."""

    samples: int
    written_bytes: int
    duration_s: float
    broken: tuple[str, ...]


def run_dump(config: DumpConfig) -> Summary:
    """Write, or complete, the store that `config` asks for."""
    ranks = read_ranks()
    device = choose_device(config.teacher.device, ranks)
    annotations = load_annotations(config.data.data, config.data.split)
    check_images(annotations)
    teacher = load_teacher(config.teacher.teacher, annotations.category_ids, device)
    job = prepare(config, annotations, teacher)
    log.info(
        f"{config.store.out}: {len(annotations.entries)} images x {config.data.views} views ="
        f" {len(job.plan.table)} samples, {store_bytes(job.manifest, job.plan.table) / 1e9:.3g} GB in"
        f" {job.manifest.layout.shards} shards; teacher {teacher.info.name} on {device}"
    )
    open_store(job, config.store.out)
    return write_shards(job, config, ranks)


def open_store(job: Job, out: Path) -> None:
    """Create the store, or check that the one at `out` was begun with the same manifest."""
    total_bytes = store_bytes(job.manifest, job.plan.table)
    if not out.exists():
        _check_room(out, total_bytes)
        create_store(out, job.manifest, job.plan, {**job.teacher.constants, **_calibrate(job)})
        return
    found = read_manifest(out)
    different = differences(job.manifest, found)
    if different:
        raise UserError(
            f"{out} is a store of another configuration and was left as it is; asked for against found:"
            f" {'; '.join(different)}. Name another --out, or remove the store"
        )
    remove_partial(out)
    missing = 1 - float(finished_shards(out, found).mean())
    _check_room(out, int(total_bytes * missing))


def write_shards(job: Job, config: DumpConfig, ranks: Ranks) -> Summary:
    """This rank's share of the shards that are not there yet: load, run the teacher, write behind it."""
    begin_s = time.monotonic()
    out, manifest = config.store.out, job.manifest
    shards = _my_shards(job, out, ranks)
    rows = [int(row) for shard in shards for row in _rows(shard, manifest.layout)]
    record_bytes = store_bytes(manifest, job.plan.table) / len(job.plan.table)
    statistics = read_statistics(out)
    broken: dict[str, None] = {}
    with (
        ThreadPoolExecutor(config.data.workers, "images") as pool,
        WriteBehind() as behind,
        tqdm(total=len(rows), unit=" samples", disable=not ranks.is_first, desc="teacher") as bar,
    ):
        samples = map_ahead(
            pool, lambda row: load_sample(job, row, config.data.skip_broken), rows, ahead=2 * manifest.batch_size
        )
        for shard in shards:
            writer = ShardWriter(out, manifest, shard)
            skipped: dict[int, str] = {}
            try:
                for batch in _batches(islice(samples, len(_rows(shard, manifest.layout))), manifest.batch_size):
                    behind(writer.add, run_batch(job, batch, statistics))
                    skipped |= {sample.row: sample.broken for sample in batch if sample.broken}
                    bar.update(len(batch))
                    bar.set_postfix_str(f"{bar.n * record_bytes / 1e9:.3g} GB")
                behind(write_skipped, out, shard, skipped)
                behind(writer.commit)
            except BaseException:
                behind.wait()
                writer.discard()
                raise
            broken |= dict.fromkeys(skipped.values())
    return Summary(len(rows), int(len(rows) * record_bytes), time.monotonic() - begin_s, tuple(broken))


def run_batch(job: Job, samples: Sequence[Sample], statistics: ChannelStatistics | None) -> list[Record]:
    """The records of some samples, from one run of the teacher; those of broken images are blank."""
    whole = [sample for sample in samples if sample.image is not None]
    records = iter(_teacher_records(job, whole, statistics) if whole else [])
    counts = job.plan.table.token_count
    return [
        next(records) if sample.image is not None else blank_record(job.manifest, int(counts[sample.row]))
        for sample in samples
    ]


def _teacher_records(job: Job, samples: Sequence[Sample], statistics: ChannelStatistics | None) -> list[Record]:
    output = job.teacher.run([sample.image for sample in samples if sample.image is not None])
    targets = [sample.targets.to(output.logits.device) for sample in samples]
    assignment, quality = assignment_and_quality(output.logits, output.boxes_cxcywh, targets)
    weights = [
        token_weights(queries, memory, layer_quality).cpu().numpy()
        for queries, memory, layer_quality in zip(output.queries, output.memory, quality, strict=True)
    ]
    columns = {
        "queries": output.queries,
        "logits": output.logits,
        "boxes_cxcywh": output.boxes_cxcywh,
        "quality": quality,
        "assignment": assignment,
    }
    arrays = {name: column.cpu().numpy() for name, column in columns.items()}
    records = []
    for index, sample in enumerate(samples):
        memory = output.memory[index].cpu().numpy()
        if not (np.isfinite(memory).all() and np.isfinite(arrays["logits"][index]).all()):
            raise UserError(f"the teacher gave NaN or infinite values for image {sample.image_id}; check its weights")
        sample_fields = {name: column[index] for name, column in arrays.items()}
        records.append({**sample_fields, **_token_fields(job, sample, memory, weights[index], statistics)})
    return records


def _token_fields(
    job: Job,
    sample: Sample,
    memory: npt.NDArray[np.float32],
    weights: npt.NDArray[np.float32],
    statistics: ChannelStatistics | None,
) -> Record:
    """The kept tokens of one sample, encoded, with their positions and weights."""
    kept = int(job.plan.table.token_count[sample.row])
    positions, kept_weights = draw_tokens(weights, kept, (job.manifest.views.seed, sample.image_id, sample.view))
    encoded = encode_tokens(memory[positions], job.manifest.codec.tokens, statistics)
    return {**encoded, "token_positions": positions, "token_weights": kept_weights}


def read_statistics(store: Path) -> ChannelStatistics | None:
    """The channel statistics that int8 tokens of this store are encoded with."""
    constants = read_constants(store)
    if "channel_scale" not in constants:
        return None
    return ChannelStatistics(constants["channel_scale"].numpy(), constants["channel_shift"].numpy())


def _calibrate(job: Job) -> dict[str, npt.NDArray[np.float32]]:
    """Channel statistics for int8, from the plan's first samples: every rank and every rerun gets the same."""
    if job.manifest.codec.tokens != "int8":
        return {}
    rows = range(min(CALIBRATION_SAMPLES, len(job.plan.table)))
    samples = [sample for row in rows if (sample := load_sample(job, row, skip_broken=True)).image is not None]
    memory = [
        tokens.cpu().numpy()
        for batch in _batches(iter(samples), job.manifest.batch_size)
        for tokens in job.teacher.run([sample.image for sample in batch if sample.image is not None]).memory
    ]
    return vars(measure_channels(np.concatenate(memory))).copy()


def _my_shards(job: Job, out: Path, ranks: Ranks) -> list[int]:
    finished = finished_shards(out, job.manifest)
    if finished.any():
        log.info(f"{int(finished.sum())} of {len(finished)} shards are there already")
    return [int(shard) for shard in np.flatnonzero(~finished) if shard % ranks.world_size == ranks.rank]


def _rows(shard: int, layout: Layout) -> range:
    return range(shard * layout.shard_samples, min(layout.samples, (shard + 1) * layout.shard_samples))


def _check_room(out: Path, needed_bytes: int) -> None:
    existing = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if needed_bytes > free_bytes:
        raise UserError(
            f"{out} needs {needed_bytes / 1e9:.3g} GB, but only {free_bytes / 1e9:.3g} GB are free; free some, name"
            " another --out, or store less (--tokens int8, --keep-tokens 0.25, fewer --views)"
        )


def _batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    while batch := list(islice(samples, size)):
        yield batch
