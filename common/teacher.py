"""A teacher and its answers: what phase one stores of a sample, and what a live teacher gives in its place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.cache.schema import TeacherInfo
from common.detr.detector import DeformableDetr
from common.geometry import level_shapes, token_positions_in_batch
from common.images import batch_to, collate
from common.records import LevelShapes, Targets
from common.targets import assignment_and_quality, released_token_weights, token_weights
from kernels import to_device


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher says of B samples, each without padding.

    memory: B tensors (T_b, C) float32, the encoder's output over all levels. queries (B, L, Q, C), logits (B, L, Q, K)
    before the sigmoid, with one column per class of the data set, boxes_cxcywh (B, L, Q, 4), of every decoder layer.
    neck: B tensors (T_b, C) float32, the encoder's input without position encoding; None where a teacher has none.
    """

    memory: list[Tensor]
    queries: Tensor
    logits: Tensor
    boxes_cxcywh: Tensor
    neck: list[Tensor] | None = None


@dataclass(frozen=True)
class Teacher:
    """A teacher, ready to run.

    run: B uint8 images (3, h, w), replayed but neither normalised nor padded, which is the teacher's own affair, -> its
    output. grid: (height, width) of a sample -> the shapes of its feature levels. constants: what the teacher has
    once, such as query_embeddings (Q, 2C). has_neck: whether its output has one.
    """

    info: TeacherInfo
    constants: Mapping[str, npt.NDArray[np.float32]]
    run: Callable[[Sequence[Tensor]], TeacherOutput]
    grid: Callable[[int, int], LevelShapes]
    has_neck: bool = False


@dataclass(frozen=True)
class Answer:
    """All that the losses need of one sample, before anything is left out or rounded.

    memory (T, C) and weights (T,), its weight map; neck (T, C) and neck_weights (T,), None where they were not asked
    for. queries (L, Q, C), logits (L, Q, K), boxes_cxcywh (L, Q, 4), quality (L, Q), assignment (L, Q) int64,
    the latter on the host.
    """

    memory: Tensor
    weights: Tensor
    neck: Tensor | None
    neck_weights: Tensor | None
    queries: Tensor
    logits: Tensor
    boxes_cxcywh: Tensor
    quality: Tensor
    assignment: Tensor


def answers(
    output: TeacherOutput, targets: Sequence[Targets], grids: Sequence[LevelShapes], *, with_neck: bool
) -> list[Answer]:
    """What follows from a teacher's output and the ground truth, on the output's device, for each of B samples.

    grids: the shapes of each sample's own feature levels. with_neck: also the neck's features and their weight map.
    """
    device = output.logits.device
    assignment, quality = assignment_and_quality(output.logits, output.boxes_cxcywh, list(targets))
    found = []
    for index, (target, grid) in enumerate(zip(targets, grids, strict=True)):
        queries, logits, boxes_cxcywh = (x[index] for x in (output.queries, output.logits, output.boxes_cxcywh))
        memory, neck, neck_weights = output.memory[index], None, None
        if with_neck:
            assert output.neck is not None, "asked for the neck of a teacher that has none"
            neck = output.neck[index]
            target_boxes_cxcywh = to_device(target.boxes_cxcywh, device)
            neck_weights = released_token_weights(queries, neck, logits, boxes_cxcywh, target_boxes_cxcywh, grid)
        weights = token_weights(queries, memory, quality[index])
        found.append(
            Answer(
                memory, weights, neck, neck_weights, queries, logits, boxes_cxcywh, quality[index], assignment[index]
            )
        )
    return found


def detector_info(model: DeformableDetr, name: str, weights_sha256: str, trained: bool) -> TeacherInfo:
    """What a store's manifest says of a Deformable DETR of this project."""
    config = model.config
    return TeacherInfo(
        name=Path(name).name,
        weights_sha256=weights_sha256,
        trained=trained,
        layers=config.decoder_layers,
        queries=config.queries,
        channels=config.width,
        strides=tuple(model.strides),
    )


def detector_teacher(
    model: DeformableDetr, name: str, weights_sha256: str, trained: bool, columns: Sequence[int]
) -> Teacher:
    """A Deformable DETR of this project as a teacher. columns: its output for each class of the data set."""
    model = model.eval().requires_grad_(False)
    info = detector_info(model, name, weights_sha256, trained)
    embeddings = model.query_embeddings
    constants = {}
    if embeddings is not None and not embeddings.is_meta:
        constants["query_embeddings"] = embeddings.detach().float().cpu().numpy()
    return Teacher(
        info=info,
        constants=constants,
        run=lambda images: run_detector(model, columns, images),
        grid=lambda height, width: level_shapes(height, width, info.strides),
        has_neck=True,
    )


def run_detector(model: DeformableDetr, columns: Sequence[int], images: Sequence[Tensor]) -> TeacherOutput:
    """A detector's output for B uint8 images (3, h, w), in one batch padded to the largest. See detector_output.

    What a detector says of a sample depends, in the last bits and at the borders of the image, on what else is in the
    batch: on the padding, and on the order of additions.
    """
    device = next(model.parameters()).device
    nothing = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    batch = batch_to(collate([(image, nothing) for image in images]), device)
    sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
    return detector_output(model, columns, batch.images, batch.padding_mask, sizes)


@torch.no_grad()  # not inference_mode: a live teacher's tokens become part of the student's graph
def detector_output(
    model: DeformableDetr,
    columns: Sequence[int],
    images: Tensor,
    padding_mask: Tensor,
    sizes: Sequence[tuple[int, int]],
) -> TeacherOutput:
    """A detector's output for a padded batch, each sample's tokens without the padding's.

    columns: the model's output for each class of the data set. images: (B, 3, H, W), padding_mask: (B, H, W) bool.
    sizes: (height, width) of each sample.
    """
    output = model(images, padding_mask)
    grids = [level_shapes(height, width, model.strides) for height, width in sizes]
    positions = [to_device(token_positions_in_batch(grid, output.level_shapes), images.device) for grid in grids]
    return TeacherOutput(
        memory=[tokens[position] for tokens, position in zip(output.memory, positions, strict=True)],
        queries=output.queries,
        logits=output.logits[..., to_device(torch.tensor(list(columns)), images.device)],
        boxes_cxcywh=output.boxes_cxcywh,
        neck=[tokens[position] for tokens, position in zip(output.neck, positions, strict=True)],
    )


def sha256_of(path: Path) -> str:
    """Hash of a file, or of all files of a folder with their names."""
    if path.is_dir():
        parts = [f"{file.relative_to(path)} {sha256_of(file)}" for file in sorted(path.rglob("*")) if file.is_file()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
