"""Checkpoints of every layout, there and back, and what is said of those that do not fit."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from common.categories import Categories
from common.detr import layouts
from common.detr.config import DetectorConfig
from common.detr.detector import DeformableDetr
from common.detr.weights import export_state, load_detector, save_detector
from common.errors import UserError
from tests import detr_oracle

SMALL = DetectorConfig(
    "resnet18", 11, width=64, encoder_layers=2, decoder_layers=3, heads=8, queries=12, levels=4, feedforward=96
)
VARIANTS = {
    "plain": dataclasses.replace(SMALL, refine=False),
    "refine": SMALL,
    "two-stage": dataclasses.replace(SMALL, two_stage=True, queries=300),  # what files that do not say it have
}
FOREIGN = (layouts.OFFICIAL, layouts.TRANSFORMERS, layouts.MMDET3, layouts.MMDET2)
Shapes = dict[str, tuple[int, ...]]


def detector(variant: str = "refine", **changes: object) -> DeformableDetr:
    model = DeformableDetr(dataclasses.replace(VARIANTS[variant], **changes)).eval()
    detr_oracle.randomise(model)
    with torch.no_grad():
        for level in model.neck.levels:  # MMDetection has none
            level.conv.bias.zero_()
    return model


def assert_same(model: DeformableDetr, loaded: DeformableDetr) -> None:
    """Equal configuration, names and weights (exact)."""
    assert loaded.config == model.config
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", FOREIGN, ids=lambda layout: layout.name)
def test_there_and_back(variant, layout, tmp_path):
    """A detector exported to a layout and loaded again is the same, configuration included, nothing left over."""
    model = detector(variant)
    state = export_state(model, layout)
    torch.save({"model" if layout is layouts.OFFICIAL else "state_dict": state, "epoch": 49}, tmp_path / "a.pth")
    loaded, report = load_detector(tmp_path / "a.pth", num_classes=11)
    assert_same(model, loaded)
    assert (report.layout, report.unused) == (layout.name, ())
    save_file(state, tmp_path / "a.safetensors")
    assert_same(model, load_detector(tmp_path / "a.safetensors")[0])


@pytest.mark.parametrize("backbone", ["tiny", "mobilenet_v2", "resnet34"])
def test_own_files(backbone, tmp_path):
    """Our own file keeps everything, also what shapes do not tell; other metadata goes along."""
    model = detector(
        backbone=backbone, heads=4, dropout=0.3, pretrained_backbone=False, tiny_channels=(8, 8, 8, 16, 24)
    )
    save_detector(tmp_path / "own.safetensors", model, {"epoch": "3"})
    loaded, report = load_detector(tmp_path / "own.safetensors")
    assert_same(model, loaded)
    assert report.lines() == [
        f"{tmp_path}/own.safetensors: Deformable DETR in the DETRCache layout: {backbone}, 11 classes, 12 queries, "
        "3 layers, with box refinement"
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_of_each_project(variant):
    """What we export has exactly the names and shapes that each project's own modules have.

    The lists below are written from the modules of the official code, of MMDetection 2.28 (`bbox_head.transformer`,
    mmcv's BaseTransformerLayer) and 3.x (`DeformableDETR`, its layers, `ChannelMapper`), not from our table.
    """
    model = detector(variant)
    for layout, expected in (
        (layouts.OFFICIAL, dict(official_shapes(variant))),
        (layouts.MMDET3, dict(mmdet_shapes(variant, version=3))),
        (layouts.MMDET2, dict(mmdet_shapes(variant, version=2))),
    ):
        found = {name: tuple(tensor.shape) for name, tensor in export_state(model, layout).items()}
        assert found == expected, layout.name


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_mmdet_roles(variant, version, tmp_path):
    """Where MMDetection's order of modules differs from the official one, each weight lands in the right place.

    In both versions a layer's norms follow its operations (attention, norm, ffn, norm), the decoder's self-attention
    comes first, and a branch's linear layers are at 0, 2, 4 of a Sequential. A checkpoint whose tensors each hold a
    value of their own is loaded, and these are looked up by role (exact).
    """
    state = {name: torch.zeros(shape) + i for i, (name, shape) in enumerate(mmdet_shapes(variant, version), start=1)}
    if variant == "plain":  # shared heads hold the same values under each name
        state |= {n: state[re.sub(r"branches\.\d+", "branches.0", n)] for n in state if "_branches." in n}
    torch.save({"state_dict": state, "meta": {"CLASSES": ("a", "b")}}, tmp_path / "a.pth")
    loaded, report = load_detector(tmp_path / "a.pth")
    assert loaded.config == VARIANTS[variant]
    assert not report.unused

    root = "" if version == 3 else "bbox_head.transformer."
    first, second, ffn = (
        ("self_attn.attn", "cross_attn", "ffn") if version == 3 else ("attentions.0.attn", "attentions.1", "ffns.0")
    )
    roles = {
        "decoder.layers.1.self_attention.in_proj_weight": f"{root}decoder.layers.1.{first}.in_proj_weight",
        "decoder.layers.1.self_attention_norm.weight": f"{root}decoder.layers.1.norms.0.weight",
        "decoder.layers.1.cross_attention.value_proj.weight": f"{root}decoder.layers.1.{second}.value_proj.weight",
        "decoder.layers.1.cross_attention_norm.bias": f"{root}decoder.layers.1.norms.1.bias",
        "decoder.layers.2.feedforward.linear1.bias": f"{root}decoder.layers.2.{ffn}.layers.0.0.bias",
        "decoder.layers.2.feedforward_norm.bias": f"{root}decoder.layers.2.norms.2.bias",
        "encoder.layers.1.attention_norm.bias": f"{root}encoder.layers.1.norms.0.bias",
        "encoder.layers.1.feedforward_norm.bias": f"{root}encoder.layers.1.norms.1.bias",
        "neck.levels.2.norm.weight": "neck.convs.2.gn.weight",
        "neck.levels.3.conv.weight": "neck.extra_convs.0.conv.weight",
        "decoder.box_heads.0.2.bias": "bbox_head.reg_branches.0.2.bias",
        "decoder.class_heads.0.bias": "bbox_head.cls_branches.0.bias",
    }
    if variant == "two-stage":
        roles |= {
            "proposer.class_head.bias": "bbox_head.cls_branches.3.bias",
            "proposer.box_head.4.weight": "bbox_head.reg_branches.3.4.weight",
            "proposer.memory_norm.bias": f"{root}{'memory_trans_norm' if version == 3 else 'enc_output_norm'}.bias",
        }
    else:
        name = "query_embedding.weight" if version == 3 else "bbox_head.query_embedding.weight"
        roles |= {"query_embedding.weight": name}
    weights = loaded.state_dict()
    for ours, theirs in roles.items():
        assert torch.equal(weights[ours], state[theirs]), (ours, theirs)
    assert not weights["neck.levels.0.conv.bias"].any()


def test_official_roles(tmp_path):
    """The official decoder numbers its norms in an order of its own: 1 after cross-attention, 2 after self-attention.

    Facts from `DeformableTransformerDecoderLayer.forward` of the official code; each tensor's value is found by role.
    """
    state = {name: torch.zeros(shape) + i for i, (name, shape) in enumerate(official_shapes("refine").items())}
    state |= {f"transformer.decoder.{name}": state[name] for name in state if name.startswith("bbox_embed.")}
    torch.save({"model": state}, tmp_path / "a.pth")
    loaded, _ = load_detector(tmp_path / "a.pth")
    theirs = {
        "cross_attention.output_proj": "cross_attn.output_proj",
        "cross_attention_norm": "norm1",
        "self_attention.out_proj": "self_attn.out_proj",
        "self_attention_norm": "norm2",
        "feedforward.linear1": "linear1",
        "feedforward.linear2": "linear2",
        "feedforward_norm": "norm3",
    }
    weights = loaded.state_dict()
    for role, name in theirs.items():
        expected = state[f"transformer.decoder.layers.1.{name}.bias"]
        assert torch.equal(weights[f"decoder.layers.1.{role}.bias"], expected), role
    assert torch.equal(
        weights["encoder.layers.1.attention_norm.bias"], state["transformer.encoder.layers.1.norm1.bias"]
    )
    assert torch.equal(weights["decoder.box_heads.2.4.bias"], state["bbox_embed.2.layers.2.bias"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_reads_our_export(variant, tmp_path):
    """transformers' from_pretrained on our export against our model: logits within 1e-4, boxes within 1e-5.

    The opposite direction of test_detr_oracle: our weights, its forward pass.
    """
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    model = detector(variant, queries=12)
    options = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    config = transformers.DeformableDetrConfig(
        backbone="resnet18",
        num_queries=12,
        two_stage_num_proposals=12,
        num_labels=11,
        **options,
        **detr_oracle.VARIANTS[variant],
    )
    config.save_pretrained(tmp_path)
    save_file(export_state(model, layouts.TRANSFORMERS), tmp_path / "model.safetensors", metadata={"format": "pt"})
    oracle, info = transformers.DeformableDetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    images, mask = detr_oracle.padded_batch()
    expected = detr_oracle.run(oracle.eval(), images, mask)
    with torch.no_grad():
        found = model(images, mask)
    assert (found.logits - expected["logits"]).abs().max() <= 1e-4
    assert (found.boxes_cxcywh - expected["boxes_cxcywh"]).abs().max() <= 1e-5


def test_transformers_own_resnet_and_config(tmp_path):
    """A model on transformers' ResNet (other names than timm's) with 4 heads and 2 points, memory within 1e-4.

    Heads cannot be read off the weights: they come from config.json, beside the file or in the folder.
    """
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        depths=[2, 2, 2, 2],
        hidden_sizes=[64, 128, 256, 512],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    oracle = detr_oracle.build(
        "refine",
        backbone,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_n_points=2,
        decoder_n_points=2,
        num_queries=9,
        dropout=0.0,
    )
    oracle.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        model, report = load_detector(path)
        assert (report.config.heads, report.config.points, report.config.dropout) == (4, 2, 0.0)
        assert not report.unused
    images, mask = detr_oracle.padded_batch()
    with torch.no_grad():
        memory = model(images, mask).memory
    assert (memory - detr_oracle.run(oracle, images, mask)["memory"]).abs().max() <= 1e-4


def test_a_distillers_checkpoint(tmp_path):
    """DETRDistill saves `student.` and `teacher.` and adaptation layers together: the student is taken, and said so."""
    model, teacher = detector(), detector("plain")
    state = {f"teacher.{k}": v for k, v in export_state(teacher, layouts.MMDET2).items()}
    state |= {f"student.{k}": v for k, v in export_state(model, layouts.MMDET2).items()}
    state["align.weight"] = torch.zeros(3)
    torch.save({"state_dict": state}, tmp_path / "epoch_50.pth")
    loaded, report = load_detector(tmp_path / "epoch_50.pth")
    assert_same(model, loaded)
    assert report.notes == ("the weights under 'student.' are taken",)
    assert "align.weight" in report.unused
    assert all(name == "align.weight" or name.startswith("teacher.") for name in report.unused)


class Log:
    """Something that is neither a tensor nor a container, pickled by reference to this module."""

    def __init__(self) -> None:
        self.values = np.arange(3.0)
        self.statistics = {"mean": Log.mean}

    def mean(self) -> float:
        raise AssertionError("code of a checkpoint was run")

    def __reduce__(self):
        return Log, (), self.__dict__

    def __setstate__(self, state: object) -> None:
        raise AssertionError("code of a checkpoint was run")


@pytest.mark.parametrize("zipped", [True, False])
def test_what_checkpoints_carry_besides(zipped, tmp_path):
    """A command line (the official checkpoints), logs with numpy arrays, paths: ignored; none of their code runs."""
    model = detector()
    carried = {"args": argparse.Namespace(lr=2e-4, output_dir="x")}
    if zipped:  # the format of torch 1.6 and later
        carried |= {"message_hub": {"loss": Log()}, "lr": np.float64(0.1), "where": pathlib.PurePosixPath("/tmp")}
    content = {"model": export_state(model, layouts.OFFICIAL), **carried}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert_same(model, load_detector(tmp_path / "a.pth")[0])


def nameless(ids: list[int]) -> Categories:
    return Categories(tuple(ids), tuple(map(str, ids)))


def test_classes_by_category_id(tmp_path):
    """A checkpoint whose outputs are category ids keeps those of the data, in its order (exact).

    The proposals of a two-stage model are ranked by output 0 whatever its class: it must stay in place.
    """
    model = detector("two-stage")
    torch.save(export_state(model, layouts.OFFICIAL), tmp_path / "a.pth")
    ids = [1, 3, 7, 10]
    loaded, report = load_detector(tmp_path / "a.pth", num_classes=4, data=nameless(ids))
    assert loaded.config.num_classes == report.config.num_classes == 4
    assert report.notes == ("4 of its 11 class outputs are kept, by category id",)
    for head, kept in zip(model.decoder.class_heads, loaded.decoder.class_heads, strict=True):
        assert torch.equal(kept.weight, head.weight[ids])
    assert torch.equal(loaded.proposer.class_head.bias, model.proposer.class_head.bias[[0, 3, 7, 10]])
    with pytest.raises(UserError, match="expected a model of 2 class outputs"):
        load_detector(tmp_path / "a.pth", data=nameless([1, 2]))
    with pytest.raises(UserError, match=r"a.pth: expected 80 classes as in the data, found a checkpoint of 11"):
        load_detector(tmp_path / "a.pth", num_classes=80)


def broken_files(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(file, what the message says of it)"""
    official = export_state(detector(), layouts.OFFICIAL)
    yield "nothing.pth", "expected a checkpoint file, found nothing at"
    torch.save(torchvision.models.resnet18().state_dict(), folder / "resnet.pth")
    yield "resnet.pth", "found another architecture with tensors such as conv1.weight, bn1.weight, "
    missing = {k: v for k, v in official.items() if "encoder.layers.1.linear1" not in k}
    torch.save(missing, folder / "missing.pth")
    yield "missing.pth", "2 tensors missing: transformer.encoder.layers.1.linear1.weight, "
    torch.save(official | {"input_proj.3.1.bias": torch.zeros(9)}, folder / "shape.pth")
    yield "shape.pth", "1 tensors of another shape: input_proj.3.1.bias"
    torch.save({k: v for k, v in official.items() if ".layer4.1." not in k}, folder / "backbone.pth")
    yield "backbone.pth", "expected one of the backbones resnet18"
    # A DINO of MMDetection: two-stage, but with learned content queries in place of projected ones.
    dino = {k: v for k, v in export_state(detector("two-stage"), layouts.MMDET3).items() if "pos_trans" not in k}
    torch.save(dino | {"query_embedding.weight": torch.zeros(300, 64)}, folder / "dino.pth")
    yield "dino.pth", "4 tensors missing: pos_trans_fc.weight"
    save_file(detector().state_dict(), folder / "bare.safetensors")
    yield "bare.safetensors", "expected the detector's configuration in the file"
    (folder / "dc5").mkdir()
    save_file(export_state(detector(), layouts.TRANSFORMERS), folder / "dc5" / "model.safetensors")
    (folder / "dc5" / "config.json").write_text(json.dumps({"model_type": "deformable_detr", "dilation": True}))
    yield "dc5", "expected a Deformable DETR as published, found dilation=True"


def test_files_that_do_not_fit(tmp_path):
    """Each gives a UserError of one line that names the file and what is wrong."""
    for name, message in broken_files(tmp_path):
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            load_detector(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def multihead(name: str) -> Shapes:
    """torch.nn.MultiheadAttention of width 64."""
    joined = {f"{name}.in_proj_weight": (192, 64), f"{name}.in_proj_bias": (192,)}
    return joined | linear(f"{name}.out_proj", 64, 64)


def deformable(name: str) -> Shapes:
    """MSDeformAttn of the official code, MultiScaleDeformableAttention of mmcv: 8 heads, 4 levels, 4 points."""
    shapes = linear(f"{name}.sampling_offsets", 64, 256) | linear(f"{name}.attention_weights", 64, 128)
    return shapes | linear(f"{name}.value_proj", 64, 64) | linear(f"{name}.output_proj", 64, 64)


def resnet18(prefix: str, counters: bool) -> Shapes:
    state = torchvision.models.resnet18().state_dict()
    return {
        prefix + name: tuple(tensor.shape)
        for name, tensor in state.items()
        if not name.startswith("fc.") and (counters or not name.endswith("num_batches_tracked"))
    }


def official_shapes(variant: str) -> Shapes:
    """DeformableDETR of the official repository, models/deformable_detr.py and models/deformable_transformer.py."""
    shapes = resnet18("backbone.0.body.", counters=False)
    for i, channels in enumerate((128, 256, 512, 512)):
        kernel = 1 if i < 3 else 3
        shapes |= {f"input_proj.{i}.0.weight": (64, channels, kernel, kernel), f"input_proj.{i}.0.bias": (64,)}
        shapes |= norm(f"input_proj.{i}.1", 64)
    shapes["transformer.level_embed"] = (4, 64)
    for i in range(2):
        layer = f"transformer.encoder.layers.{i}."
        shapes |= deformable(layer + "self_attn") | norm(layer + "norm1", 64) | norm(layer + "norm2", 64)
        shapes |= linear(layer + "linear1", 64, 96) | linear(layer + "linear2", 96, 64)
    for i in range(3):
        layer = f"transformer.decoder.layers.{i}."
        shapes |= deformable(layer + "cross_attn") | norm(layer + "norm1", 64)
        shapes |= multihead(layer + "self_attn") | norm(layer + "norm2", 64) | norm(layer + "norm3", 64)
        shapes |= linear(layer + "linear1", 64, 96) | linear(layer + "linear2", 96, 64)
    heads = 4 if variant == "two-stage" else 3
    for i in range(heads):
        boxes = {}
        for j, outputs in enumerate((64, 64, 4)):
            boxes |= linear(f"bbox_embed.{i}.layers.{j}", 64, outputs)
        classes = linear(f"class_embed.{i}", 64, 11)
        shapes |= boxes | classes
        if variant != "plain":
            shapes |= {f"transformer.decoder.{name}": shape for name, shape in boxes.items()}
        if variant == "two-stage":
            shapes |= {f"transformer.decoder.{name}": shape for name, shape in classes.items()}
    if variant == "two-stage":
        shapes |= linear("transformer.enc_output", 64, 64) | norm("transformer.enc_output_norm", 64)
        shapes |= linear("transformer.pos_trans", 128, 128) | norm("transformer.pos_trans_norm", 128)
    else:
        shapes |= {"query_embed.weight": (12, 128)} | linear("transformer.reference_points", 64, 2)
    return shapes


def mmdet_shapes(variant: str, version: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """MMDetection's Deformable DETR, version 2 (transformer inside the head) or 3 (transformer inside the detector)."""
    root = "" if version == 3 else "bbox_head.transformer."
    ffn = "ffn" if version == 3 else "ffns.0"
    shapes = resnet18("backbone.", counters=True)
    for i, channels in enumerate((128, 256, 512)):
        shapes |= {f"neck.convs.{i}.conv.weight": (64, channels, 1, 1)} | norm(f"neck.convs.{i}.gn", 64)
    shapes |= {"neck.extra_convs.0.conv.weight": (64, 512, 3, 3)} | norm("neck.extra_convs.0.gn", 64)
    shapes[root + ("level_embed" if version == 3 else "level_embeds")] = (4, 64)
    for part, layers, norms in (("encoder", 2, 2), ("decoder", 3, 3)):
        for i in range(layers):
            layer = f"{root}{part}.layers.{i}."
            if part == "encoder":
                shapes |= deformable(layer + ("self_attn" if version == 3 else "attentions.0"))
            else:
                shapes |= multihead(layer + ("self_attn.attn" if version == 3 else "attentions.0.attn"))
                shapes |= deformable(layer + ("cross_attn" if version == 3 else "attentions.1"))
            shapes |= linear(f"{layer}{ffn}.layers.0.0", 64, 96) | linear(f"{layer}{ffn}.layers.1", 96, 64)
            for j in range(norms):
                shapes |= norm(f"{layer}norms.{j}", 64)
    for i in range(4 if variant == "two-stage" else 3):
        shapes |= linear(f"bbox_head.cls_branches.{i}", 64, 11)
        for j, outputs in ((0, 64), (2, 64), (4, 4)):
            shapes |= linear(f"bbox_head.reg_branches.{i}.{j}", 64, outputs)
    if variant == "two-stage":
        memory, position = ("memory_trans", "pos_trans") if version == 3 else ("enc_output", "pos_trans")
        suffix = "_fc" if version == 3 else ""
        shapes |= linear(f"{root}{memory}{suffix}", 64, 64) | norm(f"{root}{memory}_norm", 64)
        shapes |= linear(f"{root}{position}{suffix}", 128, 128) | norm(f"{root}{position}_norm", 128)
    elif version == 3:
        shapes |= {"query_embedding.weight": (12, 128)} | linear("reference_points_fc", 64, 2)
    else:
        shapes |= {"bbox_head.query_embedding.weight": (12, 128)} | linear(f"{root}reference_points", 64, 2)
    yield from shapes.items()
