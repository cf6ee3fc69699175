"""Small, untrained detectors of `transformers`, one for each family that phase one accepts as a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from teacher_dump.transformers_teacher import import_transformers

LAYERS, QUERIES = 3, 12


def make(name: str, **options: Any) -> Any:
    """`NameForObjectDetection` with a `NameConfig` of these options."""
    transformers = import_transformers()
    common = {"decoder_layers": LAYERS, "num_queries": QUERIES, "decoder_ffn_dim": 24}
    config = getattr(transformers, f"{name}Config")(**common, **options)
    return getattr(transformers, f"{name}ForObjectDetection")(config)


def resnet(name: str = "ResNetConfig", **options: Any) -> Any:
    config = getattr(import_transformers(), name)
    return config(embedding_size=8, hidden_sizes=[8, 8, 12, 16], depths=[1] * 4, layer_type="basic", **options)


def hgnet() -> Any:
    return import_transformers().HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 16, 16],
        stage_mid_channels=[8] * 4,
        stage_out_channels=[16] * 4,
        stage_num_blocks=[1] * 4,
        stage_numb_of_layers=[1] * 4,
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3] * 4,
        hidden_sizes=[16] * 4,
        depths=[1] * 4,
        embedding_size=8,
        out_indices=[2, 3, 4],
        use_learnable_affine_block=False,
    )


ENCODER = {"encoder_layers": 1, "encoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
HYBRID = {
    **ENCODER,
    "d_model": 16,
    "encoder_hidden_dim": 16,
    "decoder_in_channels": [16] * 3,
    "anchor_image_size": None,
}


def detr(name: str, labels: int, **options: Any) -> Any:
    return make(name, backbone_config=resnet(out_features=["stage4"]), num_labels=labels, **ENCODER, **options)


def deformable_detr(labels: int, **options: Any) -> Any:
    backbone = resnet(out_features=["stage2", "stage3", "stage4"])
    options = {"with_box_refine": True} | options
    return make("DeformableDetr", backbone_config=backbone, d_model=32, num_labels=labels, **ENCODER, **options)


def rt_detr(name: str, labels: int) -> Any:
    backbone = resnet("RTDetrResNetConfig", out_indices=[2, 3, 4])
    return make(name, backbone_config=backbone, encoder_in_channels=[8, 12, 16], num_labels=labels, **HYBRID)


def d_fine(name: str, labels: int) -> Any:
    sizes = {"encoder_in_channels": [16] * 3, "decoder_n_points": [3, 6, 3], "max_num_bins": 8}
    return make(name, backbone_config=hgnet(), num_labels=labels, **sizes, **HYBRID)


def rf_detr(labels: int) -> Any:
    from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

    vit: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "out_indices": [1, 2]}
    backbone = RfDetrDinov2Config(patch_size=14, num_windows=2, image_size=224, **vit)
    heads = {"decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2, "group_detr": 2}
    return make("RfDetr", backbone_config=backbone, d_model=16, num_labels=labels, **heads)


# model_type -> a model with that many class outputs
BUILDERS: dict[str, Callable[[int], Any]] = {
    "detr": lambda labels: detr("Detr", labels, d_model=16),
    "conditional_detr": lambda labels: detr("ConditionalDetr", labels, d_model=16),
    "dab-detr": lambda labels: detr("DabDetr", labels, hidden_size=16),
    "deformable_detr": deformable_detr,
    "rt_detr": lambda labels: rt_detr("RTDetr", labels),
    "rt_detr_v2": lambda labels: rt_detr("RTDetrV2", labels),
    "d_fine": lambda labels: d_fine("DFine", labels),
    "deimv2": lambda labels: d_fine("Deimv2", labels),
    "rf_detr": rf_detr,
}


def stir(model: Any) -> Any:
    """Move every weight a little: heads that start at zero would predict the same in every layer and query."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


SEEDS = {"d_fine": 4}  # untrained, its candidates for queries may tie up to rounding, which batches then decide


def build(family: str, labels: int, seed: int | None = None) -> Any:
    """An untrained model of the family, in evaluation mode."""
    torch.manual_seed(SEEDS.get(family, 0) if seed is None else seed)
    return stir(BUILDERS[family](labels))
