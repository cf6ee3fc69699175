"""The student with what training adds to it, for each teacher: projections to its width, and its queries as a group.

None of the additions is part of the student that is saved, evaluated or exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.cache.schema import TeacherInfo
from common.detr.detector import Decoded, DeformableDetr, Encoded, QueryGroup
from common.detr.recipe import parameter_groups
from common.errors import UserError
from common.records import DetectorOutput
from kernels import to_device
from student_train.config import DistillationOptions
from student_train.contrastive_loss import ContrastiveHeads
from student_train.fgd_loss import FgdBlocks
from student_train.live import LiveOutput, LiveTeacher
from student_train.teachers import Taught


@dataclass(frozen=True)
class Pupil:
    """The student as one teacher sees it, on the n samples of a batch that it teaches.

    queries (n, L, Q, C), logits (n, L, Q, K), boxes_cxcywh (n, L, Q, 4), token_mask (n, T): of the student's output.
    memory, neck: (n, T, C of the teacher) encoder output and input for the losses on features, None where no loss needs
    them. teacher_group: what the student's decoder makes of the teacher's Q queries, logits (n, L, Q, K) and
    boxes_cxcywh (n, L, Q, 4), None without assignment distillation. contrastive_heads, fgd_blocks: the trained parts of
    those losses.
    """

    queries: Tensor
    logits: Tensor
    boxes_cxcywh: Tensor
    token_mask: Tensor
    memory: Tensor | None = None
    neck: Tensor | None = None
    teacher_group: tuple[Tensor, Tensor] | None = None
    contrastive_heads: ContrastiveHeads | None = None
    fgd_blocks: FgdBlocks | None = None


@dataclass(frozen=True)
class StudentOutput:
    """What a training step's forward pass gives.

    pupils: of each teacher that teaches any sample. teacher_queries: Q of every teacher. strides: of the student's
    feature levels. live: what a live teacher says of the batch.
    """

    output: DetectorOutput
    pupils: tuple[Pupil, ...] = ()
    teacher_queries: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    live: LiveOutput | None = None


class Bridge(nn.Module):
    """What some distillation losses add to a student to compare it with one teacher: trained projections.

    teacher_queries: (Q, 2C) the teacher's query embeddings; None if it has none of its own (two-stage), which excludes
    assignment distillation.
    """

    teacher_queries: Tensor | None

    def __init__(
        self,
        detector: DeformableDetr,
        options: DistillationOptions,
        teacher: TeacherInfo,
        teacher_queries: Tensor | None,
    ) -> None:
        super().__init__()
        self.teacher = teacher
        weights, width, channels = options.weights, detector.config.width, teacher.channels
        self.memory_projection = _projection(width, channels) if options.needs_memory else None
        self.neck_projection = _projection(width, channels) if options.needs_neck else None
        self.contrastive_heads = ContrastiveHeads(width, channels) if weights.contrastive else None
        self.fgd_blocks = FgdBlocks(channels, len(teacher.strides)) if weights.fgd else None
        self.query_projections: nn.ModuleList | None = None
        if weights.assignment:
            if teacher_queries is None or detector.reference_points is None:
                who = f"the teacher {teacher.name}" if teacher_queries is None else "this student"
                raise UserError(
                    f"assignment distillation expects queries that are the model's own, but {who} is two-stage:"
                    " its queries differ from image to image; use --assignment-weight 0"
                )
            self.query_projections = nn.ModuleList(_projection(channels, width) for _ in range(2))
        self.register_buffer("teacher_queries", teacher_queries, persistent=False)

    def query_groups(self) -> list[QueryGroup]:
        """The teacher's queries for the student's decoder: one group, or none."""
        if self.query_projections is None or self.teacher_queries is None:
            return []
        position, content = self.teacher_queries.chunk(2, dim=-1)
        project_position, project_content = self.query_projections
        return [QueryGroup(torch.cat((project_position(position), project_content(content)), dim=-1))]

    def forward(self, encoded: Encoded, own: Decoded, groups: Sequence[Decoded], samples: Tensor | None) -> Pupil:
        """What the teacher sees of the student. groups: of `query_groups`, decoded."""

        places = None if samples is None else to_device(samples, own.logits.device)

        def taken(values: Tensor) -> Tensor:
            return values if places is None else values[places]

        return Pupil(
            queries=taken(own.queries),
            logits=taken(own.logits),
            boxes_cxcywh=taken(own.boxes_cxcywh),
            token_mask=taken(encoded.token_mask),
            memory=self.memory_projection(taken(encoded.memory)) if self.memory_projection is not None else None,
            neck=self.neck_projection(taken(encoded.neck)) if self.neck_projection is not None else None,
            teacher_group=(taken(groups[0].logits), taken(groups[0].boxes_cxcywh)) if groups else None,
            contrastive_heads=self.contrastive_heads,
            fgd_blocks=self.fgd_blocks,
        )


class StudentInTraining(nn.Module):
    """A detector, a bridge to each of its teachers, and a live teacher if there is one: the only one then."""

    def __init__(
        self,
        detector: DeformableDetr,
        options: DistillationOptions,
        bridges: Sequence[Bridge] = (),
        live: LiveTeacher | None = None,
    ) -> None:
        super().__init__()
        self.detector = detector
        self.options = options
        self.bridges = nn.ModuleList(bridges)
        self.live = live

    @property
    def teacher_queries(self) -> tuple[int, ...]:
        """Q of every teacher."""
        return tuple(bridge.teacher.queries for bridge in self._bridges())

    def forward(self, images: Tensor, padding_mask: Tensor, taught: Sequence[Taught] = ()) -> StudentOutput:
        """images: (B, 3, H, W), padding_mask: (B, H, W) bool. taught: who teaches which of them; by default all.

        One encoding, and all groups of queries in one decoding, of all samples: groups cost less than the values that
        the decoder's attention takes from the memory, which they share.
        """
        encoded = self.detector.encode(images, padding_mask)
        bridges = self._bridges()
        if not taught:
            taught = [(teacher, None) for teacher in range(len(bridges))]
        groups = [bridges[teacher].query_groups() for teacher, _ in taught]
        own, *decoded = self.detector.decode_groups(encoded, [None, *(group for one in groups for group in one)])
        remaining = iter(decoded)
        pupils = [
            bridges[teacher](encoded, own, [next(remaining) for _ in of_teacher], samples)
            for (teacher, samples), of_teacher in zip(taught, groups, strict=True)
        ]
        output = DetectorOutput(
            memory=encoded.memory,
            neck=encoded.neck,
            token_mask=encoded.token_mask,
            level_shapes=encoded.level_shapes,
            queries=own.queries,
            logits=_with_idle(own.logits, [b for i, b in enumerate(bridges) if i not in dict(taught)]),
            boxes_cxcywh=own.boxes_cxcywh,
            proposals=own.proposals,
        )
        return StudentOutput(
            output,
            tuple(pupils),
            self.teacher_queries,
            strides=self.detector.strides,
            live=self.live.look(images, padding_mask) if self.live is not None else None,
        )

    def parameter_groups(self, lr: float, backbone_scale: float | None) -> list[dict[str, object]]:
        """The detector's groups, and the projections at the full learning rate."""
        groups = parameter_groups(self.detector, lr, backbone_scale)
        of_detector = {id(parameter) for group in groups for parameter in group["params"]}
        frozen = {id(parameter) for parameter in self.parameters() if not parameter.requires_grad}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in of_detector | frozen]
        return [*groups, *([{"name": "projections", "params": rest, "lr": lr}] if rest else [])]

    def _bridges(self) -> list[Bridge]:
        return [bridge for bridge in self.bridges if isinstance(bridge, Bridge)]


def _with_idle(logits: Tensor, idle: Sequence[Bridge]) -> Tensor:
    """The same logits, with bridges that no sample of the batch crosses in their graph: every rank has the same one,
    and an optimiser step does the same on one rank as on several."""
    parameters = [parameter.sum() for bridge in idle for parameter in bridge.parameters()]
    return logits + 0 * torch.stack(parameters).sum() if parameters else logits


def _projection(channels: int, to_channels: int) -> nn.Module:
    """From one width to another; over positions it is a 1x1 convolution, over tokens a linear layer."""
    return nn.Linear(channels, to_channels) if channels != to_channels else nn.Identity()
