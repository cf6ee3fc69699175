"""Which parameters learn at which rate: Deformable DETR's recipe (arXiv 2010.04159, section 5)."""

from __future__ import annotations

from typing import Any

from common.detr.detector import DeformableDetr

SLOW = 0.1


def parameter_groups(model: DeformableDetr, lr: float, backbone_scale: float | None = None) -> list[dict[str, Any]]:
    """Groups for AdamW, each with its name, its parameters and its learning rate; frozen parameters are left out.

    Sampling offsets and reference points learn at 0.1 lr, the backbone at `backbone_scale` lr: by default 0.1 where
    it starts from ImageNet weights, 1 where it starts from nothing.
    """
    if backbone_scale is None:
        from_imagenet = model.config.pretrained_backbone and model.config.backbone != "tiny"
        backbone_scale = SLOW if from_imagenet else 1.0
    scales = {"transformer": 1.0, "backbone": backbone_scale, "offsets": SLOW}
    members: dict[str, list[Any]] = {group: [] for group in scales}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group(name)].append(parameter)
    return [{"name": group, "params": members[group], "lr": lr * scale} for group, scale in scales.items()]


def _group(parameter_name: str) -> str:
    if parameter_name.startswith("backbone."):
        return "backbone"
    slow = "sampling_offsets" in parameter_name or parameter_name.startswith("reference_points")
    return "offsets" if slow else "transformer"
