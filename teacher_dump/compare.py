"""A store against the teacher that wrote it: run some samples again and compare what comes out with what is stored."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.cache.codec import SCORE_ERROR, STEP_ERROR, Decoding, Stored, decode_logits, decode_tokens, token_steps
from common.cache.product import Codebooks, distances, encode_codes
from common.cache.reader import CacheReader
from common.cache.schema import Rounding
from common.cache.storage import Location
from common.cache.writer import Record
from common.runtime import log
from teacher_dump.config import SourceOptions
from teacher_dump.encode import Statistics, read_statistics, run_teacher, stored_neck, stored_tokens, token_fields
from teacher_dump.job import Job, Sample, job_of_store, load_sample
from teacher_dump.records import stored_records
from teacher_dump.tables import table

# What another processor, or another number of threads, may change in a teacher's answer, as a share of the field's
# root mean square. On the machine that wrote the store, the codec makes the only difference.
NOISE = 1e-3
OTHER_CHOICES = 0.01  # share of assignments and drawn positions that such noise may turn
FLOAT16_ROUNDING, FLOAT16_SMALLEST = 2.0**-11, 2.0**-25  # half a unit in the last place, of normal and tiny values

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]


@dataclass
class Comparison:
    """Of one field over all samples.

    largest: |stored - teacher|, or for whole numbers the share that differ. of_bound: the largest error as a share of
    what the codec allows. within: no value differs by more than the codec and noise allow.
    """

    largest: float = 0.0
    of_bound: float = 0.0
    within: bool = True

    def add(self, stored: Array, teacher: Array, bound: Floats | float, scale: Array | None = None) -> None:
        """scale: what the noise is measured by, if not by the teacher's values."""
        error = np.abs(stored.astype(np.float32) - teacher)
        rms = float(np.sqrt(np.mean(np.square(teacher if scale is None else scale, dtype=np.float64))))
        self.largest = max(self.largest, float(error.max()))
        self.of_bound = max(self.of_bound, float((error / np.maximum(bound, 1e-30)).max()))
        self.within &= bool((error <= bound + NOISE * rms).all())

    def add_choices(self, stored: Array, teacher: Array) -> None:
        self.largest = max(self.largest, float(np.mean(stored != teacher)))
        self.within &= self.largest <= OTHER_CHOICES


def compare_with_teacher(store: Location, source: SourceOptions, samples: int) -> bool:
    """Run whole batches of the dump, `samples` samples or a few more, again; print a table; whether all fields agree.

    UserError where teacher or data are not the ones of the store.
    """
    reader = CacheReader(store)
    job = job_of_store(store, source, same_software=False)
    statistics = read_statistics(store)
    comparisons: dict[str, Comparison] = defaultdict(Comparison)
    compared = 0
    for start in _batch_starts(job, reader, samples):
        rows = range(start, min(start + job.manifest.batch_size, len(job.plan.table)))
        batch = [sample for row in rows if (sample := load_sample(job, row, skip_broken=True)).image is not None]
        records = stored_records(reader, [sample.row for sample in batch])
        for sample, record, answer in zip(batch, records, run_teacher(job, batch), strict=True):
            _compare(job, sample, record, answer, statistics, comparisons)
        compared += len(batch)
    reader.close()
    rows_of_table = [("field", "largest difference", "of the codec's bound", "")]
    for field in job.manifest.fields():
        if field.name in comparisons:
            found = comparisons[field.name]
            rounded = found.of_bound < 1e6
            difference = (
                f"{found.largest:.3g}" if field.dtype not in ("int16", "int32") else f"{found.largest:.2%} differ"
            )
            rows_of_table.append(
                (field.name, difference, f"{found.of_bound:.0%}" if rounded else "", "ok" if found.within else "WRONG")
            )
    print("\n".join(table(rows_of_table)))
    agree = bool(comparisons) and all(found.within for found in comparisons.values())
    verdict = "agree within the codec's bounds" if agree else "DISAGREE"
    print(f"{store}: {compared} samples run through {job.teacher.info.name} again: store and teacher {verdict}")
    return agree


def _compare(
    job: Job,
    sample: Sample,
    record: Record,
    answer: Record,
    statistics: Statistics,
    comparisons: dict[str, Comparison],
) -> None:
    codec, memory, weights = job.manifest.codec, answer["memory"], answer["weights"]
    fresh = token_fields(job.manifest, len(record["tokens"]), sample.image_id, sample.view, memory, weights, statistics)
    positions = record.get("token_positions", fresh["token_positions"])
    tokens = stored_tokens(record)
    _add_features(comparisons["tokens"], tokens, memory[positions], statistics.tokens, codec.rounding)
    if codec.neck:
        _add_features(comparisons["neck"], stored_neck(record), answer["neck"], statistics.neck, codec.rounding)
        comparisons["neck_weights"].add(record["neck_weights"], answer["neck_weights"], 0.0)
    if "token_positions" in record:
        comparisons["token_positions"].add_choices(positions, fresh["token_positions"])
    same = positions == fresh["token_positions"]
    comparisons["token_weights"].add(record["token_weights"][same], fresh["token_weights"][same], 0.0)
    if codec.logits == "uint8":  # the bound is one of scores
        stored, said = (
            decode_logits(torch.from_numpy(found["logits"])).sigmoid().numpy() for found in (record, answer)
        )
        comparisons["logits"].add(stored, said, SCORE_ERROR + 1e-6)
        record = {name: value for name, value in record.items() if name != "logits"}
    for name in {"queries", "logits", "boxes_cxcywh", "quality"} & record.keys():
        comparisons[name].add(record[name], answer[name], _rounding(answer[name], record[name]))
    comparisons["assignment"].add_choices(record["assignment"], answer["assignment"])


def _add_features(
    comparison: Comparison, stored: Stored, teacher: Floats, statistics: Decoding | None, rounding: Rounding
) -> None:
    """Compare features as they are stored with the teacher's."""
    if isinstance(statistics, Codebooks):  # no centroid may be nearer than the one that is stored
        nearest = distances(teacher, encode_codes(teacher, statistics), statistics)
        found = distances(teacher, stored["tokens"], statistics)
        comparison.add(
            found, np.zeros_like(found), nearest, scale=teacher @ statistics.rotation * statistics.component_scale
        )
        return
    bound: Floats | float
    if statistics is None:
        bound = _rounding(teacher, stored["tokens"])
    else:
        bound = token_steps(stored["token_scales"], statistics) * np.float32(STEP_ERROR[rounding])
    comparison.add(decode_tokens(stored, statistics), teacher, bound)


def _rounding(values: Array, stored: Array) -> Floats | float:
    """The most that storing float32 values in the type of `stored` may change each."""
    if stored.dtype != np.float16:
        return 0.0
    return np.maximum(np.abs(values) * FLOAT16_ROUNDING, FLOAT16_SMALLEST).astype(np.float32)


def _batch_starts(job: Job, reader: CacheReader, samples: int) -> list[int]:
    """First rows of enough of the dump's batches, evenly spread over the finished shards."""
    layout, group = job.manifest.layout, job.manifest.batch_size
    starts = np.arange(0, layout.samples, group)  # a shard holds whole batches
    starts = starts[reader.finished_shards[starts // layout.shard_samples]]
    wanted = min(len(starts), -(-samples // group))
    if not wanted:
        log.warning("the store has no finished shard to compare with")
        return []
    return [int(start) for start in starts[np.linspace(0, len(starts) - 1, wanted).astype(int)]]
