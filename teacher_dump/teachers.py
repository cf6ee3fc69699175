"""Teachers by name: anything that gives features, queries, logits and boxes for a list of images."""

from __future__ import annotations

from pathlib import Path

import torch

from common.cache.schema import TeacherAmp
from common.coco import Annotations
from common.detr.detector import DeformableDetr
from common.detr.presets import preset_named
from common.detr.weights import load_detector
from common.errors import UserError
from common.runtime import log
from common.teacher import Teacher, detector_teacher, sha256_of
from teacher_dump.config import RANDOM, TRANSFORMERS, check_teacher
from teacher_dump.precision import in_precision


def load_teacher(
    name: str,
    annotations: Annotations,
    device: torch.device,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    amp: TeacherAmp | None = None,
) -> Teacher:
    """The teacher called `name` on the command line: a checkpoint file, `hf:` and a model, or `random:` and a preset.

    size: (height, width) that an `hf:` teacher resizes samples to. amp: the precision it runs in. UserError if there is
    no such file, or its architecture or classes do not fit.
    """
    return in_precision(_load(name, annotations, device, size, seed), amp, device)


def _load(
    name: str, annotations: Annotations, device: torch.device, size: tuple[int, int] | None, seed: int
) -> Teacher:
    if name.startswith(TRANSFORMERS):
        from teacher_dump.transformers_teacher import load_transformers_teacher  # it builds on this module

        return load_transformers_teacher(name, annotations, device, size)
    if size is not None:
        raise UserError(f"--teacher-size is for teachers named {TRANSFORMERS}..., found {name}; leave it out")
    if name.startswith(RANDOM):
        model, weights_sha256, trained = _random_detector(name, annotations.num_classes, seed, device), "", False
        columns = tuple(range(annotations.num_classes))
        log.warning(f"{name} is an UNTRAINED teacher: good for a trial of the pipeline, worthless to learn from")
    else:
        path = Path(name)
        check_teacher(name)
        model, report = load_detector(path)
        outputs = report.outputs_for(annotations.categories)
        for line in (*report.lines(), *outputs.notes):
            log.info(line)
        columns = outputs.columns
        weights_sha256, trained = sha256_of(path), True
    return detector_teacher(model.placed(device), name, weights_sha256, trained, columns)


def _random_detector(name: str, classes: int, seed: int, device: torch.device) -> DeformableDetr:
    preset = preset_named(name.removeprefix(RANDOM), f"--teacher {RANDOM}")
    if device.type == "meta":  # shapes without numbers, all that a plan needs
        with device:
            return DeformableDetr(preset(classes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DeformableDetr(preset(classes))
