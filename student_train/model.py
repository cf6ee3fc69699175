"""The student with what training adds to it: projections to the teacher's width, and the teacher's queries as a group.

None of the additions is part of the student that is saved, evaluated or exported.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.detr.detector import DeformableDetr, QueryGroup
from common.detr.recipe import parameter_groups
from common.errors import UserError
from common.records import DetectorOutput
from student_train.config import DistillationOptions
from student_train.contrastive_loss import ContrastiveHeads
from student_train.fgd_loss import FgdBlocks
from student_train.live import LiveOutput, LiveTeacher


@dataclass(frozen=True)
class StudentOutput:
    """What a training step's forward pass gives.

    memory, neck: (B, T, C of the teacher) encoder output and input for the losses on features, None where no loss needs
    them. teacher_group: what the student's decoder makes of the teacher's Q queries, logits (B, L, Q, K) and
    boxes_cxcywh (B, L, Q, 4), None without assignment distillation. strides: of the student's feature levels.
    live: what a live teacher says of the batch. contrastive_heads, fgd_blocks: the trained parts of those losses.
    """

    output: DetectorOutput
    memory: Tensor | None = None
    neck: Tensor | None = None
    teacher_group: tuple[Tensor, Tensor] | None = None
    strides: tuple[int, ...] = ()
    live: LiveOutput | None = None
    contrastive_heads: ContrastiveHeads | None = None
    fgd_blocks: FgdBlocks | None = None


class StudentInTraining(nn.Module):
    """A detector, and what some distillation losses add to it: trained projections, and a live teacher if there is one.

    teacher_channels: C of the teacher's features and queries. teacher_queries: (Q, 2C) the teacher's query embeddings;
    None if it has none of its own (two-stage), which excludes assignment distillation. teacher_levels: its feature
    levels; by default as many as the student's.
    """

    teacher_queries: Tensor | None

    def __init__(
        self,
        detector: DeformableDetr,
        options: DistillationOptions,
        teacher_channels: int,
        teacher_queries: Tensor | None,
        live: LiveTeacher | None = None,
        teacher_levels: int | None = None,
    ) -> None:
        super().__init__()
        self.detector = detector
        self.options = options
        self.live = live
        weights = options.weights
        self.memory_projection = _projection(detector, teacher_channels) if options.needs_memory else None
        self.neck_projection = _projection(detector, teacher_channels) if options.needs_neck else None
        self.contrastive_heads: ContrastiveHeads | None = None
        if weights.contrastive:
            self.contrastive_heads = ContrastiveHeads(detector.config.width, teacher_channels)
        self.fgd_blocks: FgdBlocks | None = None
        if weights.fgd:
            self.fgd_blocks = FgdBlocks(teacher_channels, teacher_levels or len(detector.strides))
        self.query_projections: nn.ModuleList | None = None
        if weights.assignment:
            if teacher_queries is None or detector.reference_points is None:
                who = "teacher" if teacher_queries is None else "student"
                raise UserError(
                    f"assignment distillation expects queries that are the model's own, but this {who} is two-stage:"
                    " its queries differ from image to image; use --assignment-weight 0"
                )
            width = detector.config.width
            self.query_projections = nn.ModuleList(
                nn.Linear(teacher_channels, width) if width != teacher_channels else nn.Identity() for _ in range(2)
            )
        self.register_buffer("teacher_queries", teacher_queries, persistent=False)

    def forward(self, images: Tensor, padding_mask: Tensor) -> StudentOutput:
        """images: (B, 3, H, W), padding_mask: (B, H, W) bool. One encoding; all groups of queries in one decoding."""
        encoded = self.detector.encode(images, padding_mask)
        groups = [None, *self._teacher_group()]
        own, *teacher = self.detector.decode_groups(encoded, groups)
        output = DetectorOutput(
            memory=encoded.memory,
            neck=encoded.neck,
            token_mask=encoded.token_mask,
            level_shapes=encoded.level_shapes,
            queries=own.queries,
            logits=own.logits,
            boxes_cxcywh=own.boxes_cxcywh,
            proposals=own.proposals,
        )
        return StudentOutput(
            output,
            memory=self.memory_projection(encoded.memory) if self.memory_projection is not None else None,
            neck=self.neck_projection(encoded.neck) if self.neck_projection is not None else None,
            teacher_group=(teacher[0].logits, teacher[0].boxes_cxcywh) if teacher else None,
            strides=self.detector.strides,
            live=self.live.look(images, padding_mask) if self.live is not None else None,
            contrastive_heads=self.contrastive_heads,
            fgd_blocks=self.fgd_blocks,
        )

    def parameter_groups(self, lr: float, backbone_scale: float | None) -> list[dict[str, object]]:
        """The detector's groups, and the projections at the full learning rate."""
        groups = parameter_groups(self.detector, lr, backbone_scale)
        of_detector = {id(parameter) for group in groups for parameter in group["params"]}
        frozen = {id(parameter) for parameter in self.parameters() if not parameter.requires_grad}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in of_detector | frozen]
        return [*groups, *([{"name": "projections", "params": rest, "lr": lr}] if rest else [])]

    def _teacher_group(self) -> list[QueryGroup]:
        if self.query_projections is None or self.teacher_queries is None:
            return []
        position, content = self.teacher_queries.chunk(2, dim=-1)
        project_position, project_content = self.query_projections
        embeddings = torch.cat((project_position(position), project_content(content)), dim=-1)
        return [QueryGroup(embeddings)]


def _projection(detector: DeformableDetr, teacher_channels: int) -> nn.Module:
    """To the teacher's width; over positions it is a 1x1 convolution, over tokens a linear layer."""
    width = detector.config.width
    return nn.Linear(width, teacher_channels) if width != teacher_channels else nn.Identity()
