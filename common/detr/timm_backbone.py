"""Any backbone of timm that has maps at strides 8, 16 and 32, by the name "timm:NAME". Needs the package timm.

Its weights keep the names of timm's feature extractors (`features_only=True`), as transformers keeps them too.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from common.detr.config import STRIDES
from common.errors import UserError

PREFIX = "timm:"


class TimmBackbone(nn.Module):
    """body: timm's feature extractor. channels: of its maps at strides 8, 16 and 32, which `forward` returns."""

    def __init__(self, body: nn.Module, channels: Sequence[int], channels_last: bool) -> None:
        super().__init__()
        self.body = body
        self.channels = tuple(channels)
        self._channels_last = channels_last

    def forward(self, images: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.body(images)
        return [x.permute(0, 3, 1, 2).contiguous() for x in maps] if self._channels_last else maps


def build_timm(name: str, pretrained: bool, weights: Path | None = None) -> TimmBackbone:
    """timm's backbone `name` (without the prefix), random, or with the weights in a file of timm's.

    pretrained: it is to receive ImageNet weights. Then batch norm is frozen, and everything else trains: timm does not
    say, for all of its backbones, what their first stage is. UserError if timm is missing, does not know the name, or
    if the backbone has no maps at strides 8, 16 and 32 of images of any size.
    """
    timm = import_timm()
    options: dict[str, Any] = {"out_indices": timm_stages(name), "features_only": True}
    if weights is not None:
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(weights)}}
    body = timm.create_model(name, **options)
    if pretrained:
        body = timm.layers.freeze_batch_norm_2d(body)
    channels_last = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")
    return TimmBackbone(body, body.feature_info.channels(), channels_last)


def timm_stages(name: str) -> tuple[int, ...]:
    """timm's indices of the maps at strides 8, 16 and 32. UserError as in `build_timm`."""
    timm = import_timm()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise UserError(
            f"expected a backbone of timm's after 'timm:', found {name!r}" + (f": is it {near[0]}?" if near else "")
        )
    with torch.device("meta"):
        try:
            reductions = timm.create_model(name, features_only=True).feature_info.reduction()
            indices = tuple(max(i for i, stride in enumerate(reductions) if stride == wanted) for wanted in STRIDES)
            body = timm.create_model(name, features_only=True, out_indices=indices)
            body.eval()(torch.zeros(1, 3, 128, 192))  # some take images of one size only
        except (RuntimeError, AttributeError, AssertionError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"expected a backbone with maps at strides 8, 16 and 32 for images of any size, which timm's {name} has"
                f" not ({reason[:80]}): choose a convolutional one, e.g. timm:convnext_tiny"
            ) from None
    return indices


def import_timm() -> ModuleType:
    """timm; UserError where it is not installed."""
    try:
        import timm
        import timm.layers
    except ImportError:
        raise UserError("a timm: backbone needs the package timm: python -m pip install 'detrcache[timm]'") from None
    return timm  # type: ignore[no-any-return]
