"""A trained detector as files of other programs: transformers, MMDetection 3 and 2, the official code, ONNX.

Nothing of the teacher, and none of the projections that training adds, is in a checkpoint; so none is in an export.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.augment import AugmentPolicy
from common.categories import Categories
from common.coco import load_annotations
from common.detr import layouts
from common.detr.config import MOBILENETS, RESNETS, DetectorConfig
from common.detr.detector import DeformableDetr
from common.detr.layouts import State
from common.detr.timm_backbone import PREFIX as TIMM
from common.detr.timm_backbone import timm_stages
from common.detr.weights import export_state, load_detector
from common.errors import UserError
from common.files import save_tensors, write_atomically, write_json
from common.images import IMAGENET_MEAN, IMAGENET_STD
from common.runtime import log
from student_train.config import ExportConfig
from student_train.evaluate import saved_policy
from student_train.export_onnx import to_onnx

MMDETECTIONS = {"mmdet": layouts.MMDET3, "mmdet2": layouts.MMDET2}


def export(config: ExportConfig) -> None:
    """Write the checkpoint as `config.to` reads it. UserError where that program has no such model."""
    annotations = None if config.data is None else load_annotations(config.data, config.split)
    named = None if annotations is None else annotations.categories
    detector, report = load_detector(config.checkpoint, data=named)
    for line in report.lines():
        log.info(line)
    categories = report.categories or named
    if categories is None:
        log.warning("the checkpoint does not name its classes, nor will the export: name their data set with --data")
    policy = saved_policy(config.checkpoint, config.sizes)
    if config.to == "transformers":
        to_transformers(config.out, detector, categories, policy)
    elif config.to in MMDETECTIONS:
        to_mmdet(config.out, detector, categories, config.to)
    elif config.to == "official":
        to_official(config.out, detector, categories)
    else:
        to_onnx(config.out, detector, categories, policy, config.image_size)
    log.info(f"written: {config.out}")


def to_transformers(
    folder: Path, detector: DeformableDetr, categories: Categories | None, policy: AugmentPolicy
) -> None:
    """The folder that `DeformableDetrForObjectDetection.from_pretrained` and its image processor read.

    policy: the evaluation's, whose sizes the image processor is to use.
    """
    modules = {type(module).__name__ for module in detector.backbone.modules()}
    if detector.config.backbone in MOBILENETS or modules & {"BatchNormAct2d", "FrozenBatchNormAct2d"}:
        # its replace_batch_norm takes timm's norm-and-activation for a norm (seen in 5.23)
        raise UserError(
            f"transformers would drop activations of {detector.config.backbone} when it freezes batch norm: use --to"
            " onnx, or a ResNet"
        )
    write_json(folder / "config.json", transformers_config(detector.config, categories))
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "DeformableDetrImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": max(policy.short_sides), "longest_edge": policy.max_long_side},
            "resample": 2,  # bilinear
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": IMAGENET_MEAN,
            "image_std": IMAGENET_STD,
            "do_pad": True,
        },
    )
    # safetensors wants every tensor once, transformers some of them under several names: these are copies.
    state = {name: tensor.contiguous() for name, tensor in export_state(detector, layouts.TRANSFORMERS).items()}
    weights = folder / "model.safetensors"
    write_atomically(weights, lambda temporary: save_tensors(temporary, state, {"format": "pt"}))


def transformers_config(config: DetectorConfig, categories: Categories | None) -> dict[str, Any]:
    """The config.json of transformers' DeformableDetrConfig. UserError for what it cannot express."""
    stages: tuple[int, ...] = (2, 3, 4)
    if config.backbone.startswith(TIMM):
        stages = timm_stages(config.backbone.removeprefix(TIMM))
    elif config.backbone not in RESNETS:
        raise UserError(f"expected a ResNet or a timm: backbone for --to transformers, found {config.backbone!r}")
    _check_width(config, "transformers")
    names = [f"class {index}" for index in range(config.num_classes)] if categories is None else categories.names
    return {
        "architectures": ["DeformableDetrForObjectDetection"],
        "model_type": "deformable_detr",
        "backbone_config": {
            "model_type": "timm_backbone",
            "backbone": config.backbone.removeprefix(TIMM),
            "num_channels": 3,
            "features_only": True,
            "use_pretrained_backbone": False,
            "out_indices": stages[-config.levels :],
        },
        "d_model": config.width,
        "num_queries": config.queries,
        "encoder_layers": config.encoder_layers,
        "encoder_ffn_dim": config.feedforward,
        "encoder_attention_heads": config.heads,
        "encoder_n_points": config.points,
        "decoder_layers": config.decoder_layers,
        "decoder_ffn_dim": config.feedforward,
        "decoder_attention_heads": config.heads,
        "decoder_n_points": config.points,
        "num_feature_levels": config.levels,
        "dropout": config.dropout,
        "with_box_refine": config.refine,
        "tie_word_embeddings": False,  # the weights hold every layer's heads
        "two_stage": config.two_stage,
        "two_stage_num_proposals": config.queries,
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        # not transformers' own: which of the data's category ids each output is
        **({} if categories is None else {"category_ids": categories.ids}),
    }


def to_mmdet(path: Path, detector: DeformableDetr, categories: Categories | None, program: str = "mmdet") -> None:
    """A checkpoint of MMDetection's `DeformableDETR`, its classes where `init_detector` looks for them.

    program: "mmdet" for version 3, "mmdet2" for version 2, on which DETRDistill is built.
    """
    config = detector.config
    _check_backbone(config, (*RESNETS, *MOBILENETS), program)
    _check_width(config, program)
    state = export_state(detector, MMDETECTIONS[program])
    names = () if categories is None else categories.names
    meta: dict[str, Any] = {"dataset_meta": {"classes": names}, "CLASSES": names} if names else {}
    _save(path, {"state_dict": state, "meta": meta})
    if any(name.startswith("neck.") and name.endswith(".conv.bias") for name in state):
        if program == "mmdet2":
            log.warning(
                "its neck's convolutions have biases, which MMDetection 2 drops without a word: give its ChannelMapper"
                " some before loading (docs/troubleshooting.md)"
            )
        else:
            log.info("its neck's convolutions have biases: in MMDetection, give the ChannelMapper bias=True")
    if config.backbone in MOBILENETS:
        last = 6 if config.backbone == "mobilenet_v2" else 7
        log.info(f"MMDetection's MobileNetV2 gives the three levels with out_indices=(2, 4, {last})")


def to_official(path: Path, detector: DeformableDetr, categories: Categories | None) -> None:
    """A checkpoint of the official Deformable DETR, for its `--resume`.

    There an output is a category id (91 outputs for COCO), so the class heads are spread over them: outputs of ids that
    the data does not have are given a probability of practically zero.
    """
    config = detector.config
    _check_backbone(config, RESNETS, "official")
    _check_width(config, "official")
    state = export_state(detector, layouts.OFFICIAL)
    outputs = config.num_classes
    if categories is not None:
        outputs = max(categories.ids) + 1
        state = spread_classes(state, categories.ids, config)
    _save(path, {"model": state})
    log.info(f"the official code must build it with num_classes = {outputs} ({'by category id' if categories else ''})")
    if config.backbone in ("resnet18", "resnet34"):
        log.info(
            f"its models/backbone.py has the channels of ResNet-50 written in, and needs those of {config.backbone}"
        )


def spread_classes(state: State, category_ids: tuple[int, ...], config: DetectorConfig) -> State:
    """Official class heads of K outputs -> of one output for each category id up to the largest.

    The two-stage proposals are ranked by their output 0 whatever it stands for, so that one stays in its place.
    """
    spread = dict(state)
    for name, tensor in state.items():
        head = re.fullmatch(r"(?:transformer\.decoder\.)?class_embed\.(\d+)\.(weight|bias)", name)
        if head is None:
            continue
        proposes = config.two_stage and int(head[1]) == config.decoder_layers
        ids = (0, *category_ids[1:]) if proposes else category_ids
        wide: Tensor = tensor.new_zeros(max(category_ids) + 1, *tensor.shape[1:])
        if head[2] == "bias":
            wide -= 100.0  # sigmoid(-100) = 4e-44
        wide[list(ids)] = tensor
        spread[name] = wide
    return spread


def _save(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def _check_backbone(config: DetectorConfig, known: Any, program: str) -> None:
    if config.backbone not in known:
        raise UserError(
            f"expected a backbone among {', '.join(known)} for --to {program}, found {config.backbone!r}: use --to onnx"
        )


def _check_width(config: DetectorConfig, program: str) -> None:
    if config.width % 32:
        raise UserError(
            f"expected a width that 32 divides for --to {program}, whose neck has 32 groups, found {config.width}:"
            " use --to onnx"
        )
    if config.two_stage and config.width != 256 and program != "transformers":
        raise UserError(
            f"expected a width of 256 for a two-stage detector and --to {program}, whose encoding of proposals has it"
            f" written in, found {config.width}: use --to transformers or onnx"
        )
