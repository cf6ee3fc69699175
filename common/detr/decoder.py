"""Object queries -> decoder layers -> classes and boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.detr.attention import DeformableAttention, FeedForward, SamplingFrame, frame_of_boxes, frame_of_points
from common.detr.config import DetectorConfig
from common.records import LevelShapes


@dataclass(frozen=True)
class Queries:
    """What enters the decoder. content, position: (B, Q, C). reference: (B, Q, 2) points or (B, Q, 4) boxes_cxcywh,
    in 0..1 of the sample's own extent."""

    content: Tensor
    position: Tensor
    reference: Tensor


@dataclass(frozen=True)
class Decoded:
    """One group of queries after the decoder.

    queries: (B, L, Q, C). logits: (B, L, Q, K). boxes_cxcywh: (B, L, Q, 4). proposals: where the model is two-stage and
    the group is its own, the encoder's logits (B, T, K) and boxes_cxcywh (B, T, 4).
    """

    queries: Tensor
    logits: Tensor
    boxes_cxcywh: Tensor
    proposals: tuple[Tensor, Tensor] | None = None


def box_head(width: int) -> nn.Sequential:
    """Three linear layers: a query -> four numbers, zeros at first, added to its reference before the sigmoid."""
    last = nn.Linear(width, 4)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), last)


def class_head(width: int, classes: int) -> nn.Linear:
    """A linear layer that starts by giving every class the probability 0.01 (focal loss, arXiv 1708.02002, 4.1)."""
    head = nn.Linear(width, classes)
    nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))
    return head


class DecoderLayer(nn.Module):
    """Self-attention among the queries of a group, deformable attention to the memory, feed-forward; post-norm."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        width, dropout = config.width, config.dropout
        self.self_attention = nn.MultiheadAttention(width, config.heads, dropout=dropout, batch_first=True)
        self.self_attention_norm = nn.LayerNorm(width)
        self.cross_attention = DeformableAttention(width, config.heads, config.levels, config.points)
        self.cross_attention_norm = nn.LayerNorm(width)
        self.feedforward = FeedForward(width, config.feedforward, dropout)
        self.feedforward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.self_attention.out_proj.weight)

    def forward(
        self,
        queries: Tensor,
        positions: Tensor,
        group_sizes: list[int],
        frame: SamplingFrame,
        memory: Tensor,
        token_mask: Tensor,
        shapes: LevelShapes,
    ) -> Tensor:
        """queries, positions: (B, Q, C), the groups one after another along Q; memory: (B, T, C). Returns (B, Q, C)."""
        placed = queries + positions
        groups = zip(torch.split(placed, group_sizes, 1), torch.split(queries, group_sizes, 1), strict=True)
        attended = [self.self_attention(keys, keys, values, need_weights=False)[0] for keys, values in groups]
        queries = self.self_attention_norm(queries + self.dropout(torch.cat(attended, 1)))
        sampled = self.cross_attention(queries + positions, frame, memory, token_mask, shapes)
        queries = self.cross_attention_norm(queries + self.dropout(sampled))
        out: Tensor = self.feedforward_norm(queries + self.feedforward(queries))
        return out


class Decoder(nn.Module):
    """The decoder's layers and the heads that read each layer's queries.

    refine: every layer has its own heads and passes its boxes on as the next layer's reference (iterative
    bounding box refinement, arXiv 2010.04159, appendix A.4); otherwise one pair of heads serves all layers.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.points, self.refine = config.points, config.refine
        heads = config.decoder_layers if config.refine else 1
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.class_heads = nn.ModuleList(class_head(config.width, config.num_classes) for _ in range(heads))
        self.box_heads = nn.ModuleList(box_head(config.width) for _ in range(heads))
        if not config.two_stage:  # points say nothing of sizes, so let the first boxes be small: sigmoid(-2) = 0.12
            nn.init.constant_(self.box_heads[0].get_parameter("4.bias")[2:], -2.0)

    def forward(
        self,
        groups: Sequence[Queries],
        memory: Tensor,
        token_mask: Tensor,
        shapes: LevelShapes,
        valid_ratios: Tensor,
    ) -> list[Decoded]:
        """Decode groups of queries in one pass. Groups do not see each other: each comes out as if it were alone."""
        sizes = [group.content.shape[1] for group in groups]
        queries = torch.cat([group.content for group in groups], 1)
        positions = torch.cat([group.position for group in groups], 1)
        references = [group.reference for group in groups]
        layers = []
        for index, layer in enumerate(self.layers):
            frame = _frame(references, shapes, valid_ratios, self.points)
            queries = layer(queries, positions, sizes, frame, memory, token_mask, shapes)
            head = index if self.refine else 0
            logits = self.class_heads[head](queries).float()
            shift = torch.cat([_reference_logits(reference) for reference in references], 1)
            boxes = (self.box_heads[head](queries).float() + shift).sigmoid()  # bfloat16 is too coarse for places
            layers.append((queries, logits, boxes))
            if self.refine:
                references = list(torch.split(boxes.detach(), sizes, 1))
        all_queries, all_logits, all_boxes = (
            torch.split(torch.stack(x, 1), sizes, 2) for x in zip(*layers, strict=True)
        )
        return [Decoded(*group) for group in zip(all_queries, all_logits, all_boxes, strict=True)]


def inverse_sigmoid(x: Tensor) -> Tensor:
    """log(x / (1 - x)) for x in 0..1, numerator and denominator at least 1e-5."""
    return torch.log(x.clamp(min=1e-5) / (1 - x).clamp(min=1e-5))


def _reference_logits(reference: Tensor) -> Tensor:
    """(B, Q, 2 or 4) -> (B, Q, 4): what the box head's output is added to; a point says nothing of width and height."""
    logits = inverse_sigmoid(reference)
    return nn.functional.pad(logits, (0, 4 - logits.shape[-1]))


def _frame(references: Sequence[Tensor], shapes: LevelShapes, valid_ratios: Tensor, points: int) -> SamplingFrame:
    """The sampling frame of all groups together; each has points or boxes as its reference."""
    frames = []
    for reference in references:
        ratios = valid_ratios.repeat(1, 1, reference.shape[-1] // 2)
        placed = reference[:, :, None] * ratios[:, None]
        is_box = reference.shape[-1] == 4
        frames.append(frame_of_boxes(placed, points) if is_box else frame_of_points(placed, shapes))
    centre = torch.cat([frame.centre for frame in frames], 1)
    unit = torch.cat([frame.unit.expand_as(frame.centre) for frame in frames], 1)
    return SamplingFrame(centre, unit)
