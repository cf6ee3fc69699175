"""From samples to records: what the teacher says of them, what follows from it, and how it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from common.cache.codec import ChannelStatistics, Decoding, Stored, encode_logits, encode_tokens, measure_channels
from common.cache.product import Codebooks, train_codebooks
from common.cache.reader import read_constants, read_manifest
from common.cache.sampling import draw_tokens
from common.cache.schema import Manifest
from common.cache.storage import Location, locate
from common.cache.validate import damage_explained
from common.cache.writer import Record, blank_record
from common.errors import UserError
from common.finite import check_finite
from common.images import PADDING_MULTIPLE
from common.teacher import Answer, answers
from teacher_dump.job import Job, Sample

Floats = npt.NDArray[np.float32]

NECK_FIELDS = {"tokens": "neck", "token_scales": "neck_scales"}
CALIBRATION_SAMPLES = 64  # of the plan's, evenly spread over it, that channel statistics and codebooks come from
CALIBRATION_TOKENS = 512  # of each, at most


@dataclass(frozen=True)
class Statistics:
    """What a store's features are encoded with; None for floats and for what is not stored."""

    tokens: Decoding | None = None
    neck: Decoding | None = None


@dataclass(frozen=True)
class Calibration:
    """Some tokens (N, C) of one sample, and what each counts (N,); the same of its neck, if that is stored."""

    tokens: Floats
    weights: Floats
    neck: Floats | None = None
    neck_weights: Floats | None = None


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
        records.append(storable(job.manifest, {**answer, **tokens}, sample.image_id, sample.view))
    return records


def storable(manifest: Manifest, record: Record, image_id: int, view: int) -> Record:
    """The fields of a record as they are stored. UserError where one is NaN, or too large for what it is stored as."""
    stored: dict[str, npt.NDArray[Any]] = {}
    for field in manifest.fields():
        if field.name in record:
            with np.errstate(over="ignore"):
                stored[field.name] = record[field.name].astype(field.dtype, copy=False)
            if not np.isfinite(stored[field.name]).all():
                raise UserError(
                    f"{field.name} of image {image_id}, view {view} cannot be stored as {field.dtype}: it is NaN or too"
                    " large (float16 goes to 65504); check the teacher's weights, or store more with --preset full"
                )
    return stored


def run_teacher(job: Job, samples: Sequence[Sample]) -> list[Record]:
    """What the teacher says of each sample that has an image: all its tokens, before anything is left out or rounded.

    memory (T, C) float32 and weights (T,) float32 of all tokens, the same of the neck (neck and neck_weights) where the
    store holds it, and the sample fields of a record. Samples run together only if they are padded to the same size, so
    that none is padded more than it would be alone: group norm takes its statistics over the padding too, and a
    sample of 64 pixels padded to 128 was found to get other features altogether. UserError where the teacher gives NaN
    or infinity.
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
        output = job.teacher.run([image for _, image in group])
        given = {name: value for name, value in vars(output).items() if value is not None}
        check_finite(given, [sample.image_id for sample, _ in group], f"the teacher {job.teacher.info.name}")
        found = answers(
            output,
            [sample.targets for sample, _ in group],
            [job.teacher.grid(int(image.shape[1]), int(image.shape[2])) for _, image in group],
            with_neck=job.manifest.codec.neck,
        )
        records |= {index: _arrays(answer) for index, answer in zip(indices, found, strict=True)}
    return [records[index] for index in range(len(whole))]


def _arrays(answer: Answer) -> Record:
    return {name: value.cpu().numpy() for name, value in vars(answer).items() if isinstance(value, torch.Tensor)}


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


def stored_tokens(record: Record) -> Stored:
    """The fields that `encode_tokens` gave."""
    return {name: record[name] for name in ("tokens", "token_scales") if name in record}


def stored_neck(record: Record) -> Stored:
    """The fields that `encode_neck` gave, under the names that `decode_tokens` knows."""
    return {name: record[neck] for name, neck in NECK_FIELDS.items() if neck in record}


def calibration_rows(samples: int, batch_size: int) -> list[range]:
    """The batches of a dump of so many samples whose tokens are looked at before any is encoded."""
    starts = np.arange(0, samples, batch_size)
    wanted = min(len(starts), -(-CALIBRATION_SAMPLES // batch_size))
    chosen = starts[np.linspace(0, len(starts) - 1, wanted).astype(int)].tolist()
    return [range(start, min(start + batch_size, samples)) for start in chosen]


def calibration_of(
    key: tuple[int, int, int],
    tokens: Floats,
    weights: Floats,
    neck: Floats | None = None,
    neck_weights: Floats | None = None,
) -> Calibration:
    """CALIBRATION_TOKENS of a sample's tokens (T, C), drawn by their weights (T,). key: (seed, image id, view)."""
    kept = min(CALIBRATION_TOKENS, len(tokens))
    drawn, counts = draw_tokens(weights, kept, key)
    found = Calibration(tokens[drawn], counts)
    if neck is None or neck_weights is None:
        return found
    drawn, counts = draw_tokens(neck_weights, kept, key)
    return replace(found, neck=neck[drawn], neck_weights=counts)


def calibrations(manifest: Manifest, samples: Sequence[Sample], answers: Sequence[Record]) -> list[Calibration]:
    """Of the samples that have an image, from the answers of `run_teacher`."""
    whole = [sample for sample in samples if sample.image is not None]
    return [
        calibration_of(
            (manifest.views.seed, sample.image_id, sample.view),
            *(answer[name] for name in ("memory", "weights", "neck", "neck_weights") if name in answer),
        )
        for sample, answer in zip(whole, answers, strict=True)
    ]


def calibrate(manifest: Manifest, samples: Sequence[Calibration], broken: Sequence[str] = ()) -> dict[str, Floats]:
    """The channel statistics or codebooks that the store's codec needs, as constants of the store.

    broken: why others than `samples` are not there. UserError without any sample, with the first reason.
    """
    codec = manifest.codec
    if not codec.calibrated:
        return {}
    if not samples:
        reason = f"none of {len(broken)} images could be decoded, the first: {broken[0]}" if broken else "there is none"
        raise UserError(f"expected samples to find what --tokens {codec.tokens} needs, but {reason}")

    def measured(tokens: Sequence[Floats], weights: Sequence[Floats]) -> dict[str, Floats]:
        every = np.concatenate(tokens)
        if codec.components:
            return vars(train_codebooks(every, np.concatenate(weights), codec.components))
        return vars(measure_channels(every))

    constants = measured([sample.tokens for sample in samples], [sample.weights for sample in samples])
    if codec.neck:
        necks = [(s.neck, s.neck_weights) for s in samples if s.neck is not None and s.neck_weights is not None]
        of_neck = measured(*zip(*necks, strict=True))
        constants = constants | {f"neck_{name}": value for name, value in of_neck.items()}
    return constants


Kind = TypeVar("Kind", ChannelStatistics, Codebooks)


def statistics_of(constants: dict[str, Floats]) -> Statistics:
    """What features are encoded with, among a store's constants."""

    def found(kind: type[Kind], prefix: str) -> Kind | None:
        names = [field.name for field in fields(kind)]
        if any(prefix + name not in constants for name in names):
            return None
        return kind(**{name: constants[prefix + name] for name in names})

    def either(prefix: str) -> Decoding | None:
        return found(ChannelStatistics, prefix) or found(Codebooks, prefix)

    return Statistics(either(""), either("neck_"))


def read_statistics(store: Location) -> Statistics:
    """What the features of a store are encoded with."""
    with damage_explained(locate(store)):
        constants = read_constants(store, read_manifest(store))
    return statistics_of({name: value.numpy() for name, value in constants.items()})
