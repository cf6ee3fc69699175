"""The two-stage variant: the encoder's best proposals become the object queries (arXiv 2010.04159, appendix A.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.detr.config import DetectorConfig
from common.detr.decoder import Queries, box_head, class_head
from common.detr.encoder import cell_centres
from common.detr.positions import box_encoding
from common.errors import UserError
from common.records import LevelShapes


class Proposer(nn.Module):
    """Every token proposes a box; the `queries` best become the references and the queries of the decoder."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.queries = config.queries
        self.memory_projection = nn.Linear(config.width, config.width)
        self.memory_norm = nn.LayerNorm(config.width)
        self.class_head = class_head(config.width, config.num_classes)
        self.box_head = box_head(config.width)
        self.query_projection = nn.Linear(2 * config.width, 2 * config.width)
        self.query_norm = nn.LayerNorm(2 * config.width)
        for linear in (self.memory_projection, self.query_projection):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self, memory: Tensor, token_mask: Tensor, shapes: LevelShapes, valid_ratios: Tensor
    ) -> tuple[Queries, tuple[Tensor, Tensor]]:
        """memory (B, T, C) -> the decoder's queries, and all proposals: logits (B, T, K), boxes_cxcywh (B, T, 4).

        Only class 0's logit ranks the proposals: the encoder is trained with every object labelled 0. Tokens that
        are padding, or lie within 1% of the border, propose the whole image from a zero vector.
        """
        if memory.shape[1] < self.queries:
            raise UserError(
                f"expected at least queries={self.queries} tokens for a two-stage model; found {memory.shape[1]}: "
                f"use larger images or fewer queries"
            )
        anchors = anchor_boxes(shapes, valid_ratios)
        invalid = token_mask[..., None] | ((anchors <= 0.01) | (anchors >= 0.99)).any(-1, keepdim=True)
        shift = torch.log(anchors / (1 - anchors)).masked_fill(invalid, float("inf"))
        tokens = self.memory_norm(self.memory_projection(memory.masked_fill(invalid, 0.0)))
        logits, boxes = self.class_head(tokens).float(), (self.box_head(tokens).float() + shift).sigmoid()

        best = logits[..., 0].topk(self.queries, 1).indices
        reference = boxes.detach().gather(1, best[..., None].expand(-1, -1, 4))
        embedding = self.query_norm(self.query_projection(box_encoding(reference, memory.shape[-1])))
        position, content = embedding.chunk(2, -1)
        return Queries(content, position, reference), (logits, boxes)


def anchor_boxes(shapes: LevelShapes, valid_ratios: Tensor) -> Tensor:
    """(B, T, 4) boxes_cxcywh: centred on each token, 0.05 wide and high on the finest level, doubling per level."""
    centres = cell_centres(shapes, valid_ratios)
    sizes = [centres.new_full((height * width, 2), 0.05 * 2.0**level) for level, (height, width) in enumerate(shapes)]
    return torch.cat([centres, torch.cat(sizes).expand_as(centres)], -1)
