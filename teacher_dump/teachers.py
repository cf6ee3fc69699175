"""Teachers: anything that gives features, queries, logits and boxes for a list of images."""

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
from common.coco import Annotations, output_columns
from common.detr.detector import DeformableDetr
from common.detr.presets import PRESETS
from common.detr.weights import load_detector
from common.errors import UserError
from common.geometry import level_shapes, token_positions_in_batch
from common.images import collate, normalise
from common.records import LevelShapes, Targets
from common.runtime import log

RANDOM, TRANSFORMERS = "random:", "hf:"


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher says of B samples, each without padding.

    memory: B tensors (T_b, C) float32, the encoder's output over all levels. queries (B, L, Q, C), logits (B, L, Q, K)
    before the sigmoid, with one column per class of the data set, boxes_cxcywh (B, L, Q, 4), of every decoder layer.
    """

    memory: list[Tensor]
    queries: Tensor
    logits: Tensor
    boxes_cxcywh: Tensor


@dataclass(frozen=True)
class Teacher:
    """A teacher, ready to run.

    run: B uint8 images (3, h, w), replayed but neither normalised nor padded, which is the teacher's own affair, -> its
    output. grid: (height, width) of a sample -> the shapes of its feature levels. constants: what the teacher has
    once, such as query_embeddings (Q, 2C).
    """

    info: TeacherInfo
    constants: Mapping[str, npt.NDArray[np.float32]]
    run: Callable[[Sequence[Tensor]], TeacherOutput]
    grid: Callable[[int, int], LevelShapes]


def load_teacher(
    name: str,
    annotations: Annotations,
    device: torch.device,
    size: tuple[int, int] | None = None,
    seed: int = 0,
) -> Teacher:
    """The teacher called `name` on the command line: a checkpoint file, `hf:` and a model, or `random:` and a preset.

    size: (height, width) that an `hf:` teacher resizes samples to. UserError if there is no such file, or its
    architecture or classes do not fit.
    """
    if name.startswith(TRANSFORMERS):
        from teacher_dump.transformers_teacher import load_transformers_teacher  # it builds on this module

        return load_transformers_teacher(name, annotations, device, size)
    if size is not None:
        raise UserError(f"--teacher-size is for teachers named {TRANSFORMERS}..., found {name}; leave it out")
    category_ids = annotations.category_ids
    if name.startswith(RANDOM):
        model, weights_sha256, trained = _random_detector(name, len(category_ids), seed), "", False
        log.warning(f"{name} is an UNTRAINED teacher: good for a trial of the pipeline, worthless to learn from")
    else:
        path = Path(name)
        if not path.exists():
            raise UserError(
                f"expected a teacher's checkpoint, found no file {name}; name one with --teacher, train one with"
                " `python -m student_train --student r101`, or try the pipeline with --teacher random:r101"
            )
        model, report = load_detector(path)
        for line in report.lines():
            log.info(line)
        weights_sha256, trained = sha256_of(path), True
    return detector_teacher(model.to(device), name, weights_sha256, trained, category_ids)


def detector_teacher(
    model: DeformableDetr, name: str, weights_sha256: str, trained: bool, category_ids: Sequence[int]
) -> Teacher:
    """A Deformable DETR of this project as a teacher."""
    model = model.eval().requires_grad_(False)
    config, device = model.config, next(model.parameters()).device
    columns = list(output_columns(category_ids, config.num_classes))
    embeddings = model.query_embeddings
    constants = {} if embeddings is None else {"query_embeddings": embeddings.detach().float().cpu().numpy()}
    info = TeacherInfo(
        name=Path(name).name,
        weights_sha256=weights_sha256,
        trained=trained,
        layers=config.decoder_layers,
        queries=config.queries,
        channels=config.width,
        strides=tuple(model.strides),
    )

    def grid(height: int, width: int) -> LevelShapes:
        return level_shapes(height, width, info.strides)

    @torch.inference_mode()
    def run(images: Sequence[Tensor]) -> TeacherOutput:
        nothing = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        batch = collate([(normalise(image), nothing) for image in images])
        output = model(batch.images.to(device), batch.padding_mask.to(device))
        positions = [
            token_positions_in_batch(grid(*image.shape[-2:]), output.level_shapes).to(device) for image in images
        ]
        return TeacherOutput(
            memory=[memory[position] for memory, position in zip(output.memory, positions, strict=True)],
            queries=output.queries,
            logits=output.logits[..., columns],
            boxes_cxcywh=output.boxes_cxcywh,
        )

    return Teacher(info, constants, run, grid)


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


def _random_detector(name: str, classes: int, seed: int) -> DeformableDetr:
    preset = PRESETS.get(name.removeprefix(RANDOM))
    if preset is None:
        raise UserError(f"expected {RANDOM} followed by one of {', '.join(PRESETS)}, found {name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DeformableDetr(preset(classes))
