"""Deformable DETR (Zhu et al., arXiv 2010.04159): images in, everything that is cached or trained on out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.detr.backbone import build_backbone
from common.detr.config import DetectorConfig
from common.detr.decoder import Decoded, Decoder, Queries
from common.detr.encoder import Encoder, Neck, level_masks, valid_share
from common.detr.positions import token_encoding
from common.detr.two_stage import Proposer
from common.records import DetectorOutput, LevelShapes

__all__ = ["Decoded", "DeformableDetr", "DetectorConfig", "Encoded", "QueryGroup"]


@dataclass(frozen=True)
class Encoded:
    """Images after the encoder, as often as one wants to decode them.

    memory: (B, T, C) encoder output; neck: (B, T, C) encoder input, without position encoding. token_mask: (B, T) True
    where padded. level_shapes: of the padded batch. valid_ratios: (B, levels, 2), the unpadded share of each level's
    width and height.
    """

    memory: Tensor
    neck: Tensor
    token_mask: Tensor
    level_shapes: LevelShapes
    valid_ratios: Tensor


@dataclass(frozen=True)
class QueryGroup:
    """Queries of another model, to be decoded by this one.

    embeddings: (Q, 2C) or (B, Q, 2C), position part first, content part second, as in `query_embeddings`. reference:
    (B, Q, 2) points or (B, Q, 4) boxes_cxcywh where the decoder is to start; without it this model's own layer derives
    points from the position part, which a two-stage model cannot (it has no such layer).
    """

    embeddings: Tensor
    reference: Tensor | None = None


class DeformableDetr(nn.Module):
    """`forward` is `encode` and then `decode`; the halves are public because distillation decodes more than once."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(
            config.backbone, config.pretrained_backbone, config.tiny_channels, config.tiny_blocks
        )
        self.neck = Neck(self.backbone.channels[-config.levels :], config.levels, config.width)
        self.level_embedding = nn.Parameter(torch.randn(config.levels, config.width))
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.query_embedding: nn.Embedding | None = None
        self.reference_points: nn.Linear | None = None
        self.proposer: Proposer | None = None
        if config.two_stage:
            self.proposer = Proposer(config)
        else:
            self.query_embedding = nn.Embedding(config.queries, 2 * config.width)
            self.reference_points = nn.Linear(config.width, 2)
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each level; batches are best padded to a multiple of the last."""
        return self.config.strides

    @property
    def query_embeddings(self) -> Tensor | None:
        """(Q, 2C): position part, then content part; None where the queries are the encoder's proposals."""
        return None if self.query_embedding is None else self.query_embedding.weight

    def placed(self, device: torch.device) -> DeformableDetr:
        """This model, moved to a device. On a GPU its backbone is laid out channels last, as tensor cores compute."""
        self.to(device)
        if device.type == "cuda":
            self.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def forward(self, images: Tensor, padding_mask: Tensor) -> DetectorOutput:
        """images: (B, 3, H, W) float, normalised, 0 where padded; padding_mask: (B, H, W) bool, True where padded."""
        encoded = self.encode(images, padding_mask)
        decoded = self.decode(encoded)
        return DetectorOutput(
            memory=encoded.memory,
            neck=encoded.neck,
            token_mask=encoded.token_mask,
            level_shapes=encoded.level_shapes,
            queries=decoded.queries,
            logits=decoded.logits,
            boxes_cxcywh=decoded.boxes_cxcywh,
            proposals=decoded.proposals,
        )

    def encode(self, images: Tensor, padding_mask: Tensor) -> Encoded:
        """Backbone, neck and encoder. Shapes as in `forward`."""
        maps = self.neck(self.backbone(images)[-self.config.levels :])
        shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
        masks = level_masks(padding_mask, shapes)
        valid_ratios = valid_share(masks)
        token_mask = torch.cat([mask.flatten(1) for mask in masks], 1)
        neck = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        encodings = [token_encoding(mask, self.config.width) for mask in masks]
        positions = torch.cat([e + level for e, level in zip(encodings, self.level_embedding, strict=True)], 1)
        memory = self.encoder(neck, positions, token_mask, shapes, valid_ratios)
        return Encoded(memory, neck, token_mask, shapes, valid_ratios)

    def decode(self, encoded: Encoded, query_embeddings: Tensor | None = None) -> Decoded:
        """Decode this model's own queries or, given embeddings (Qe, 2C) of another model, those alone."""
        return self.decode_groups(encoded, [None if query_embeddings is None else QueryGroup(query_embeddings)])[0]

    def decode_groups(self, encoded: Encoded, groups: Sequence[QueryGroup | None]) -> list[Decoded]:
        """Decode several groups of queries in one pass over the same memory; None stands for this model's own.

        There is no attention between groups: each comes out as if it had been decoded alone.
        """
        context = (encoded.memory, encoded.token_mask, encoded.level_shapes, encoded.valid_ratios)
        pairs = [
            self._own_queries(encoded) if group is None else (self._foreign(encoded, group), None) for group in groups
        ]
        decoded = self.decoder([queries for queries, _ in pairs], *context)
        return [
            Decoded(d.queries, d.logits, d.boxes_cxcywh, proposals)
            for d, (_, proposals) in zip(decoded, pairs, strict=True)
        ]

    def _own_queries(self, encoded: Encoded) -> tuple[Queries, tuple[Tensor, Tensor] | None]:
        if self.proposer is not None:
            own: tuple[Queries, tuple[Tensor, Tensor]] = self.proposer(
                encoded.memory, encoded.token_mask, encoded.level_shapes, encoded.valid_ratios
            )
            return own
        assert self.query_embedding is not None
        return self._foreign(encoded, QueryGroup(self.query_embedding.weight)), None

    def _foreign(self, encoded: Encoded, group: QueryGroup) -> Queries:
        if group.embeddings.shape[-1] != 2 * self.config.width:
            raise ValueError(
                f"expected query embeddings of 2 x {self.config.width} channels; found {group.embeddings.shape[-1]}: "
                f"project them to this model's width first"
            )
        embeddings = group.embeddings.expand(encoded.memory.shape[0], -1, -1)
        position, content = embeddings.chunk(2, -1)
        if group.reference is not None:
            return Queries(content, position, group.reference)
        if self.reference_points is None:
            raise ValueError(
                "expected reference points with queries for a two-stage model; found none: pass QueryGroup"
            )
        return Queries(content, position, self.reference_points(position).float().sigmoid())
