"""From samples to records: what the teacher says of them, what follows from it, and how it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.cache.codec import ChannelStatistics, encode_tokens, measure_channels
from common.cache.reader import read_constants
from common.cache.sampling import draw_tokens
from common.cache.schema import Manifest
from common.cache.writer import Record, blank_record
from common.errors import UserError
from teacher_dump.job import Job, Sample
from teacher_dump.targets import assignment_and_quality, token_weights

Floats = npt.NDArray[np.float32]

CALIBRATION_SAMPLES = 16  # of the plan's first samples, for the spread of the channels


def encode_records(
    job: Job, samples: Sequence[Sample], answers: Sequence[Record], statistics: ChannelStatistics | None
) -> list[Record]:
    """The records of some samples, from the answers of `run_teacher`; those of broken images are blank."""
    remaining = iter(answers)
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
        records.append({**answer, **tokens})
    return records


def run_teacher(job: Job, samples: Sequence[Sample]) -> list[Record]:
    """What the teacher says of each sample that has an image: all its tokens, before anything is left out or rounded.

    memory (T, C) float32 and weights (T,) float32 of all tokens, and the sample fields of a record.
    """
    whole = [sample for sample in samples if sample.image is not None]
    if not whole:
        return []
    output = job.teacher.run([sample.image for sample in whole if sample.image is not None])
    targets = [sample.targets.to(output.logits.device) for sample in whole]
    assignment, quality = assignment_and_quality(output.logits, output.boxes_cxcywh, targets)
    columns = {
        "queries": output.queries,
        "logits": output.logits,
        "boxes_cxcywh": output.boxes_cxcywh,
        "quality": quality,
        "assignment": assignment,
    }
    arrays = {name: column.cpu().numpy() for name, column in columns.items()}
    answers: list[Record] = []
    for index, sample in enumerate(whole):
        weights = token_weights(output.queries[index], output.memory[index], quality[index])
        answer = {name: column[index] for name, column in arrays.items()} | {
            "memory": output.memory[index].cpu().numpy(),
            "weights": weights.cpu().numpy(),
        }
        if not (np.isfinite(answer["memory"]).all() and np.isfinite(answer["logits"]).all()):
            raise UserError(f"the teacher gave NaN or infinite values for image {sample.image_id}; check its weights")
        answers.append(answer)
    return answers


def token_fields(
    manifest: Manifest,
    kept: int,
    image_id: int,
    view: int,
    memory: Floats,
    weights: Floats,
    statistics: ChannelStatistics | None,
) -> Record:
    """The token fields of one sample: `kept` of its tokens (T, C), drawn by their weights (T,), and encoded."""
    positions, kept_weights = draw_tokens(weights, kept, (manifest.views.seed, image_id, view))
    encoded = encode_tokens(memory[positions], manifest.codec.tokens, statistics)
    return {**encoded, "token_positions": positions, "token_weights": kept_weights}


def calibrate(manifest: Manifest, memories: Sequence[Floats]) -> dict[str, Floats]:
    """The store's channel statistics, where its codec needs them, from all tokens of CALIBRATION_SAMPLES samples."""
    if manifest.codec.tokens != "int8":
        return {}
    if not memories:
        raise UserError(f"none of the first {CALIBRATION_SAMPLES} images could be decoded; check the image folder")
    return dict(vars(measure_channels(np.concatenate(list(memories)))))


def read_statistics(store: Path) -> ChannelStatistics | None:
    """The channel statistics that the tokens of a store are encoded with, if they are."""
    constants = read_constants(store)
    if "channel_scale" not in constants:
        return None
    return ChannelStatistics(constants["channel_scale"].numpy(), constants["channel_shift"].numpy())
