"""transformers' Deformable DETR with random weights, the oracle of several test files."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

VARIANTS: dict[str, dict[str, bool]] = {
    "plain": {"with_box_refine": False, "two_stage": False},
    "refine": {"with_box_refine": True, "two_stage": False},
    "two-stage": {"with_box_refine": True, "two_stage": True},
}


def build(variant: str, backbone: Any = "resnet18", **options: Any) -> nn.Module:
    """DeformableDetrForObjectDetection of this variant, every parameter and statistic random, in eval mode."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    named = {"backbone": backbone} if isinstance(backbone, str) else {"backbone_config": backbone}
    config = DeformableDetrConfig(**named, **VARIANTS[variant], **options)
    model = DeformableDetrForObjectDetection(config).eval()
    if variant != "plain":  # transformers 5.23 ties the class heads of all layers; published checkpoints do not
        model.class_embed = nn.ModuleList(copy.deepcopy(head) for head in model.class_embed)
        if variant == "two-stage":
            model.model.decoder.class_embed = model.class_embed
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Fill every parameter and buffer with noise, also those that start at zero, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        noise = torch.empty_like(tensor).normal_(generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif "sampling_offsets.bias" in name:
            tensor.copy_(2 * noise)
        elif tensor.dim() > 1:
            tensor.copy_(noise / math.sqrt(tensor[0].numel()))
        elif name.endswith("weight"):  # of norms
            tensor.copy_(0.6 + 0.1 * noise)
        else:
            tensor.copy_(0.2 * noise)


def padded_batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Two images of 128x160 and 96x110 pixels, the second padded: images (2, 3, 128, 160), mask, True where padded."""
    images = torch.zeros(2, 3, 128, 160)
    mask = torch.ones(2, 128, 160, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for index, (height, width) in enumerate([(128, 160), (96, 110)]):
        images[index, :, :height, :width] = torch.randn(3, height, width, generator=generator)
        mask[index, :height, :width] = False
    return images, mask


@torch.no_grad()
def run(model: nn.Module, images: Tensor, padding_mask: Tensor) -> dict[str, Tensor]:
    """What the oracle computes, by the names of `DetectorOutput`: memory, queries, logits and boxes of every layer."""
    output = model(images, pixel_mask=(~padding_mask).long())
    queries = output.intermediate_hidden_states
    layers = range(queries.shape[1])
    logits = torch.stack([model.class_embed[layer](queries[:, layer]) for layer in layers], 1)
    boxes = []
    for layer in layers:
        reference = output.init_reference_points
        if model.config.with_box_refine and layer:
            reference = output.intermediate_reference_points[:, layer - 1]
        box = model.bbox_embed[layer](queries[:, layer])
        box[..., : reference.shape[-1]] += torch.logit(reference, eps=1e-5)
        boxes.append(box.sigmoid())
    outputs = {
        "memory": output.encoder_last_hidden_state,
        "queries": queries,
        "logits": logits,
        "boxes_cxcywh": torch.stack(boxes, 1),
        "last_logits": output.logits,
        "last_boxes_cxcywh": output.pred_boxes,
    }
    if model.config.two_stage:
        outputs |= {
            "proposal_logits": output.enc_outputs_class,
            "proposal_boxes_cxcywh": output.enc_outputs_coord_logits.sigmoid(),
        }
    return outputs
