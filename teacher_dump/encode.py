"""From samples to records: what the teacher says of them, what follows from it, and how it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from common.cache.codec import ChannelStatistics, Stored, encode_logits, encode_tokens, measure_channels
from common.cache.reader import read_constants
from common.cache.sampling import draw_tokens
from common.cache.schema import Manifest
from common.cache.storage import Location
from common.cache.writer import Record, blank_record
from common.errors import UserError
from common.images import PADDING_MULTIPLE
from common.teacher import Answer, answers
from teacher_dump.job import Job, Sample

Floats = npt.NDArray[np.float32]

NECK_FIELDS = {"tokens": "neck", "token_scales": "neck_scales"}
CALIBRATION_SAMPLES = 16  # of the plan's first samples, for the spread of the channels


@dataclass(frozen=True)
class Statistics:
    """The channel statistics that a store's features are encoded with; None for what is not quantised or not stored."""

    tokens: ChannelStatistics | None = None
    neck: ChannelStatistics | None = None


def encode_records(
    job: Job, samples: Sequence[Sample], found: Sequence[Record], statistics: Statistics
) -> list[Record]:
    """The records of some samples, from the answers of `run_teacher`; those of broken images are blank."""
    remaining = iter(found)
    counts = job.plan.table.token_count
    records: list[Record] = []
    for sample in samples:
        kept = int(counts[sample.row])
        if sample.image is None:
            records.append(blank_record(job.manifest, kept))
            continue
        answer = dict(next(remaining))
        memory, weights = answer.pop("memory"), answer.pop("weights")
        tokens = token_fields(job.manifest, kept, sample.image_id, sample.view, memory, weights, statistics)
        if job.manifest.codec.logits == "uint8":
            answer["logits"] = encode_logits(answer["logits"])
        if "neck" in answer:
            answer |= encode_neck(job.manifest, sample.image_id, sample.view, answer["neck"], statistics)
        records.append({**answer, **tokens})
    return records


def run_teacher(job: Job, samples: Sequence[Sample]) -> list[Record]:
    """What the teacher says of each sample that has an image: all its tokens, before anything is left out or rounded.

    memory (T, C) float32 and weights (T,) float32 of all tokens, the same of the neck (neck and neck_weights) where the
    store holds it, and the sample fields of a record. Samples run together only if they are padded to the same size, so
    that none is padded more than it would be alone: group norm takes its statistics over the padding too, and a
    sample of 64 pixels padded to 128 was found to get other features altogether.
    """
    whole = [(sample, sample.image) for sample in samples if sample.image is not None]
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (_, image) in enumerate(whole):
        resized = job.teacher.info.input_size is not None
        padded = () if resized else tuple(-(-side // PADDING_MULTIPLE) for side in image.shape[1:])
        groups.setdefault(padded, []).append(index)
    records: dict[int, Record] = {}
    for indices in groups.values():
        group = [whole[index] for index in indices]
        found = answers(
            job.teacher.run([image for _, image in group]),
            [sample.targets for sample, _ in group],
            [job.teacher.grid(int(image.shape[1]), int(image.shape[2])) for _, image in group],
            with_neck=job.manifest.codec.neck,
        )
        records |= {index: _checked(answer, whole[index][0]) for index, answer in zip(indices, found, strict=True)}
    return [records[index] for index in range(len(whole))]


def _checked(answer: Answer, sample: Sample) -> Record:
    """The arrays of an answer. UserError if they are not finite."""
    record = {name: value.cpu().numpy() for name, value in vars(answer).items() if isinstance(value, torch.Tensor)}
    if not (np.isfinite(record["memory"]).all() and np.isfinite(record["logits"]).all()):
        raise UserError(f"the teacher gave NaN or infinite values for image {sample.image_id}; check its weights")
    return record


def token_fields(
    manifest: Manifest,
    kept: int,
    image_id: int,
    view: int,
    memory: Floats,
    weights: Floats,
    statistics: Statistics,
) -> Record:
    """The token fields of one sample: `kept` of its tokens (T, C), drawn by their weights (T,), and encoded."""
    positions, kept_weights = draw_tokens(weights, kept, (manifest.views.seed, image_id, view))
    codec, key = manifest.codec, (manifest.views.seed, image_id, view, 0)
    encoded = encode_tokens(memory[positions], codec.tokens, statistics.tokens, codec.rounding, key)
    return {**encoded, "token_positions": positions, "token_weights": kept_weights}


def encode_neck(manifest: Manifest, image_id: int, view: int, neck: Floats, statistics: Statistics) -> Record:
    """The stored fields of a sample's neck features (T, C), all of them."""
    codec, key = manifest.codec, (manifest.views.seed, image_id, view, 1)
    encoded = encode_tokens(neck, codec.tokens, statistics.neck, codec.rounding, key)
    return {NECK_FIELDS[name]: value for name, value in encoded.items()}


def stored_neck(record: Record) -> Stored:
    """The fields that `encode_neck` gave, under the names that `decode_tokens` knows."""
    return {name: record[neck] for name, neck in NECK_FIELDS.items() if neck in record}


def calibrate(manifest: Manifest, memories: Sequence[Floats], necks: Sequence[Floats] = ()) -> dict[str, Floats]:
    """The store's channel statistics, where its codec needs them, from all tokens of CALIBRATION_SAMPLES samples."""
    if not manifest.codec.quantised:
        return {}
    if not memories:
        raise UserError(f"none of the first {CALIBRATION_SAMPLES} images could be decoded; check the image folder")
    constants: dict[str, Floats] = dict(vars(measure_channels(np.concatenate(list(memories)))))
    if manifest.codec.neck:
        measured = vars(measure_channels(np.concatenate(list(necks))))
        constants |= {f"neck_{name}": value for name, value in measured.items()}
    return constants


def statistics_of(constants: dict[str, Floats]) -> Statistics:
    """The channel statistics among a store's constants."""

    def measured(prefix: str) -> ChannelStatistics | None:
        scale, shift = constants.get(f"{prefix}channel_scale"), constants.get(f"{prefix}channel_shift")
        return None if scale is None or shift is None else ChannelStatistics(scale, shift)

    return Statistics(measured(""), measured("neck_"))


def read_statistics(store: Location) -> Statistics:
    """The channel statistics that the features of a store are encoded with, if they are."""
    return statistics_of({name: value.numpy() for name, value in read_constants(store).items()})
