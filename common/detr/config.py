"""What a detector is made of, as one value that checkpoints and manifests carry."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import UserError

STRIDES = (8, 16, 32)  # of the three stages that every backbone gives, C3, C4 and C5
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")  # torchvision's names
MOBILENETS = ("mobilenet_v2", "mobilenet_v2_1280")
BACKBONES = (*RESNETS, *MOBILENETS, "tiny")


@dataclass(frozen=True)
class DetectorConfig:
    """Everything that decides the shapes of a detector's weights, and how it runs.

    backbone: resnet18, resnet34, resnet50, resnet101, mobilenet_v2, mobilenet_v2_1280, tiny, or timm:NAME for one of
    timm's. num_classes: K. width: C. levels: feature levels, up to three the coarsest of C3, C4, C5, further ones by
    stride-2 convolutions beyond C5. points: sampling points of each head in each level. refine: iterative bounding box
    refinement. two_stage: the queries come from the encoder's best proposals (needs refine). pretrained_backbone: the
    backbone is to receive ImageNet weights, so its batch norm and its first stage are frozen. tiny_channels,
    tiny_blocks: of the backbone "tiny", see `build_backbone`.

    JSON-able by `dataclasses.asdict`, and back by `from_dict`. Raises UserError if the values do not go together.
    """

    backbone: str
    num_classes: int
    width: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 6
    heads: int = 8
    queries: int = 300
    levels: int = 4
    points: int = 4
    feedforward: int = 1024
    dropout: float = 0.1
    refine: bool = True
    two_stage: bool = False
    pretrained_backbone: bool = True
    tiny_channels: tuple[int, ...] = (12, 16, 32, 64, 128)
    tiny_blocks: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiny_channels", tuple(self.tiny_channels))  # JSON knows lists only
        if self.backbone not in BACKBONES and not self.backbone.startswith("timm:"):
            raise UserError(f"expected a backbone among {', '.join(BACKBONES)} or timm:NAME; found {self.backbone!r}")
        counts = ("num_classes", "width", "decoder_layers", "heads", "queries", "levels", "points", "tiny_blocks")
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"expected {name} of at least 1; found {getattr(self, name)}")
        if self.width % 4 or self.width % self.heads:
            raise UserError(f"expected a width that 4 and heads={self.heads} divide; found width={self.width}")
        if self.two_stage and not self.refine:
            raise UserError("expected refine=True where two_stage=True: proposals are boxes, which layers then refine")
        if self.encoder_layers < 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"expected encoder_layers of at least 0 and a dropout in 0..1; found {self.encoder_layers} and"
                f" {self.dropout}"
            )
        if len(self.tiny_channels) != 5 or min(self.tiny_channels) < 1:
            raise UserError(f"expected 5 tiny_channels, of the stem and of four stages; found {self.tiny_channels}")

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each level: (8, 16, 32, 64) for four levels, (32,) for one."""
        beyond = tuple(STRIDES[-1] << extra for extra in range(1, self.levels - len(STRIDES) + 1))
        return STRIDES[-self.levels :] + beyond

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DetectorConfig:
        """The inverse of `dataclasses.asdict`. UserError for values of another type, and for unknown names: they come
        from another version."""
        from pydantic import TypeAdapter, ValidationError

        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"expected a detector configuration of this version; found unknown {', '.join(unknown)}")
        try:
            return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UserError(f"expected a detector configuration; found {place} = {first['input']!r}") from None
