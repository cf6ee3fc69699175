"""What the student is trained to lower: the detection and distillation losses of one batch, weighted, by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from common.matching import PaddedTargets, detection_cost, pad_targets, queries_of_boxes
from common.records import Targets
from kernels import hungarian, hungarian_start, to_device
from student_train import distill_loss as distill
from student_train.config import DistillationOptions
from student_train.contrastive_loss import contrastive_loss
from student_train.feature_loss import align, feature_loss, neck_loss
from student_train.fgd_loss import fgd_losses
from student_train.live import live_targets
from student_train.model import Pupil, StudentOutput
from student_train.set_loss import proposal_losses, set_loss
from student_train.step_counts import StepCounts, counts_of_step
from student_train.teachers import Lesson

Losses = dict[str, Tensor]
LessonLosses = tuple[Lesson, Losses]


def add_up(own: Losses, taught: Sequence[LessonLosses]) -> Losses:
    """By name, over all teachers."""
    losses: Losses = {}
    for _, of_lesson in taught:
        for name, loss in of_lesson.items():
            losses[name] = losses[name] + loss if name in losses else loss
    return losses | own


def separate_losses(
    student: StudentOutput,
    targets: list[Targets],
    lessons: Sequence[Lesson],
    options: DistillationOptions,
    counts: Sequence[StepCounts] = (),
) -> tuple[Losses, list[LessonLosses]]:
    """The weighted losses, those from ground truth and those of each lesson. One of weight 0 is neither computed nor
    listed.

    lessons: what the teachers say of the batch, one for each of the student's pupils; none trains plainly, or with what
    a live teacher says. counts: of the step that this batch is a part of, for each of the store's teachers, by which
    the losses are divided, so that those of all parts add up to the step's; by default the batch is the whole step of
    its rank. (A loss that is a mean over samples is multiplied by the batch's share of them.)

    Matchings are solved on the host: they are started as soon as their costs are known, and what needs none of them is
    computed before the first is waited for.
    """
    output = student.output
    truth = pad_targets(targets, output.logits.device)
    if student.live is not None:
        lessons = [Lesson(live_targets(student.live, targets, with_neck=options.needs_neck))]
    if not counts:
        boxes = [len(of_sample.labels) for of_sample in targets]
        counts = counts_of_step(boxes, output.logits.shape[2], student.teacher_queries, output.logits.device)
    box_count = counts[0].boxes
    cost = detection_cost(output.logits, output.boxes_cxcywh, truth)
    matching = hungarian_start(cost, column_mask=truth.valid.unsqueeze(1))

    taught: list[LessonLosses] = []
    for lesson, pupil in zip(lessons, student.pupils, strict=bool(lessons)):
        of_lesson = _distillation_losses(student, pupil, truth, lesson, counts[lesson.teacher], options)
        taught.append((lesson, {name: lesson.weight * loss for name, loss in of_lesson.items()}))
    losses = _named("detection", set_loss(output.logits, output.boxes_cxcywh, truth, matching.result(), box_count))
    if output.proposals is not None:
        losses |= _named("proposals", proposal_losses(*output.proposals, output.token_mask, truth, box_count))
    return losses, taught


def _distillation_losses(
    student: StudentOutput,
    pupil: Pupil,
    truth: PaddedTargets,
    lesson: Lesson,
    counts: StepCounts,
    options: DistillationOptions,
) -> Losses:
    """Those of one teacher on the samples that it teaches, divided by what the step has of all samples."""
    grids, boxes, weights = student.output.level_shapes, truth.labels.shape[1], options.weights
    cached = distill.at_student_layers(lesson.cached, pupil.logits.shape[1])
    if lesson.samples is not None:
        samples = to_device(lesson.samples, pupil.logits.device)
        truth = PaddedTargets(truth.boxes_cxcywh[samples], truth.labels[samples], truth.valid[lesson.samples])
    share = len(truth.labels) / counts.samples  # of a loss that is a mean over samples
    losses: Losses = {}
    if pupil.memory is not None:
        aligned = align(pupil.memory, grids, pupil.token_mask, student.strides, cached)
        losses["features"] = weights.features * feature_loss(aligned, cached) * share
    if pupil.neck is not None:
        aligned = align(pupil.neck, grids, pupil.token_mask, student.strides, cached)
        if options.mode == "released" and weights.features:
            losses["features"] = weights.features * neck_loss(aligned, cached) * share
        if pupil.fgd_blocks is not None:
            losses |= _named("fgd", fgd_losses(aligned, cached, truth, pupil.fgd_blocks), weights.fgd * share)
    if pupil.teacher_group is not None:  # under the teacher's own assignment or, released, the student's
        if options.mode == "paper":
            matched = queries_of_boxes(cached.assignment, boxes)
        else:
            matched = hungarian(detection_cost(*pupil.teacher_group, truth), column_mask=truth.valid.unsqueeze(1))
        assigned = set_loss(*pupil.teacher_group, truth, matched, counts.boxes)
        losses |= _named("assignment", assigned, weights.assignment)
    if weights.logits or pupil.contrastive_heads is not None:
        predicted = (pupil.logits, pupil.boxes_cxcywh)
        found = distill.match_queries(*predicted, cached, boxes, options.mode)
        if pupil.contrastive_heads is not None:
            contrast = contrastive_loss(
                pupil.queries, cached.queries, found[1], found[0].index, pupil.contrastive_heads
            )
            losses["contrastive"] = weights.contrastive * contrast * share
        if weights.logits:
            soft = distill.logits_losses(*predicted, cached, boxes, options.mode, counts, found)
            losses |= _named("logits", soft, weights.logits)
    return losses


def needed_fields(options: DistillationOptions) -> set[str]:
    """The fields of a store that the losses read; the others need not be."""
    weights = options.weights
    names = {"assignment"}  # a few kilobytes
    if weights.logits or weights.contrastive:
        names |= {"logits", "boxes_cxcywh"}
    if weights.contrastive:
        names |= {"queries"}
    if options.needs_memory:
        names |= {"tokens", "token_scales", "token_positions", "token_weights"}
    if options.needs_neck:
        names |= {"neck", "neck_scales"} | ({"neck_weights"} if options.mode == "released" else set())
    return names


def _named(prefix: str, losses: Losses, weight: float | Tensor = 1.0) -> Losses:
    return {f"{prefix}/{name}": weight * loss for name, loss in losses.items()}
